"""DeepSpeed's JSON: no `auto` survives, nothing contradicts the options, what we cannot carry is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from flexlora_ds.errors import UserError
from launch.data.batch_layout import batch_layout
from launch.engine.adam import AdamSettings, adam_settings
from launch.engine.ds_config import auto_paths, resolve_ds_config
from launch.engine.ds_json import read_ds_json
from launch.options.train_options import TrainOptions

FOLDER = Path(__file__).resolve().parents[2] / "ds_configs"
SHIPPED = sorted(FOLDER.glob("*.json"))
DTYPES = ("fp32", "bf16", "fp16")


def options(**values: Any) -> TrainOptions:
    return TrainOptions(**({"dtype": "fp32"} | values))


def resolve(
    source: Any, options: TrainOptions, processes: int, *, hidden_size: int | None = None
) -> dict[str, Any]:
    """As a run does: the engine's configuration, and the optimizer block checked."""
    read, layout = read_ds_json(source), batch_layout(options, processes)
    assert options.dtype != "auto"
    resolved = resolve_ds_config(read, options, layout, options.dtype, hidden_size=hidden_size)
    adam_settings(read, options)
    return resolved


def adam(source: dict[str, Any], options: TrainOptions) -> AdamSettings:
    return adam_settings(read_ds_json(source), options)


def refused(settings: dict[str, Any], **values: Any) -> str:
    with pytest.raises(UserError) as caught:
        resolve(settings, options(**values), 2)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_all_stages_and_offloads_are_shipped() -> None:
    assert {path.stem for path in SHIPPED} == {
        *(f"zero{stage}" for stage in range(4)),
        *(f"zero{stage}_offload" for stage in (1, 2, 3)),
        "zero3_offload_optimizer",
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_serve_every_dtype(path: Path, dtype: str) -> None:
    written = json.loads(path.read_text())
    assert not {"optimizer", "scheduler"} & set(written)
    resolved = resolve(path, options(dtype=dtype, max_grad_norm=0.5), 2, hidden_size=64)
    assert "auto" not in json.dumps(resolved)
    assert resolved["train_batch_size"] == 16
    assert resolved["train_micro_batch_size_per_gpu"] == 8
    assert resolved["gradient_accumulation_steps"] == 1
    assert resolved["gradient_clipping"] == 0.5
    assert resolved["bf16"]["enabled"] is (dtype == "bf16")
    assert resolved["fp16"]["enabled"] is (dtype == "fp16")
    assert resolved["zero_optimization"]["stage"] == int(path.stem[4])
    assert resolved["zero_allow_untested_optimizer"] is True
    assert resolved["zero_force_ds_cpu_optimizer"] is False


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_deepspeed_itself_reads_what_was_resolved(path: Path) -> None:
    config = pytest.importorskip("deepspeed.runtime.config")
    resolved = resolve(path, options(dtype="bf16", batch_size=6, micro_batch_size=3), 1)
    read = config.DeepSpeedConfig(copy.deepcopy(resolved))
    assert (read.train_batch_size, read.train_micro_batch_size_per_gpu) == (6, 3)
    assert read.gradient_accumulation_steps == 2
    assert read.bfloat16_config.enabled and not read.float16_config.enabled
    assert read.zero_optimization_stage == int(path.stem[4])
    offloads = read.zero_config.offload_optimizer
    assert (offloads is not None and offloads.device == "cpu") is ("_offload" in path.stem)
    assert (read.zero_config.offload_param is not None) is (path.stem == "zero3_offload")


def test_an_empty_json_gets_everything_it_needs() -> None:
    resolved = resolve({}, options(batch_size=12, micro_batch_size=2), 3)
    assert resolved["train_batch_size"] == 12
    assert resolved["gradient_accumulation_steps"] == 2
    assert resolved["zero_optimization"] == {"stage": 0}


def test_the_callers_dictionary_is_not_changed() -> None:
    mine = {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}, "optimizer": {"type": "AdamW"}}
    before = copy.deepcopy(mine)
    resolve(mine, options(), 1)
    assert mine == before


def test_buffer_sizes_follow_the_models_width() -> None:
    zero = {
        "stage": 3,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
    }
    resolved = resolve({"zero_optimization": zero}, options(), 1, hidden_size=576)
    assert resolved["zero_optimization"]["reduce_bucket_size"] == 576**2
    assert resolved["zero_optimization"]["stage3_prefetch_bucket_size"] == int(0.9 * 576**2)
    assert resolved["zero_optimization"]["stage3_param_persistence_threshold"] == 5760


def test_keys_of_deepspeed_alone_pass_through() -> None:
    mine = {"wall_clock_breakdown": True, "comms_logger": {"enabled": True}, "some_future_key": [1, {"a": 2}]}
    resolved = resolve(mine, options(), 1)
    assert {key: resolved[key] for key in mine} == mine


def test_an_auto_without_a_known_value_is_refused_at_any_depth() -> None:
    message = refused({"comms_logger": {"filters": [{"level": "auto"}]}})
    assert "comms_logger.filters[0].level" in message
    assert list(auto_paths({"a": ["auto", {"b": "auto"}], "c": "automatic"})) == ["a[0]", "a[1].b"]


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"train_batch_size": 32}, ["32 contradicts the option batch_size", "16", "key train_batch_size"]),
        ({"train_micro_batch_size_per_gpu": 4}, ["micro_batch_size", "8"]),
        ({"gradient_accumulation_steps": 2}, ["gradient_accumulation_steps", "1"]),
        ({"gradient_clipping": 0.3}, ["max_grad_norm", "0.3"]),
        ({"bf16": {"enabled": True}}, ["the option dtype", "bf16.enabled"]),
        ({"bfloat16": {"enabled": True}}, ["the option dtype", "bf16.enabled"]),
        ({"fp16": {"enabled": True}}, ["the option dtype", "fp16.enabled"]),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-5}}}, ["the option lr", "optimizer.params.lr"]),
        ({"optimizer": {"type": "AdamW", "params": {"weight_decay": 0.1}}}, ["the option weight_decay"]),
    ],
)
def test_contradictions_name_both_sides(settings: dict[str, Any], parts: list[str]) -> None:
    message = refused(settings)
    assert all(part in message for part in [*parts, '"auto"']), message


def test_a_contradiction_says_where_the_option_was_given(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"train_batch_size": 32}')
    mine = TrainOptions(batch_size=8, dtype="fp32", places={"batch_size": "--batch_size on the command line"})
    with pytest.raises(UserError, match=r"--batch_size on the command line.*ds\.json, key train_batch_size"):
        resolve(path, mine, 1)


def test_the_users_adamw_block_becomes_ours() -> None:
    block = {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": [0.8, 0.99], "eps": 1e-6, "weight_decay": 0.1},
    }
    mine = options(weight_decay=0.1)
    settings = adam({"optimizer": block}, mine)
    assert (settings.betas, settings.eps, settings.weight_decay) == ((0.8, 0.99), 1e-6, 0.1)
    assert "optimizer" not in resolve({"optimizer": block}, mine, 1)
    assert adam({}, mine).betas == (0.9, 0.999)


@pytest.mark.parametrize(
    ("block", "part"),
    [
        ({"type": "Lamb"}, "Lamb"),
        ({"type": "OneBitAdam", "params": {"lr": 3e-4}}, "OneBitAdam"),
        ({"params": {}}, "None"),
        ({"type": "AdamW", "params": {"amsgrad": True}}, "amsgrad"),
        ({"type": "Adam", "params": {"adam_w_mode": False}}, "decoupled"),
        ({"type": "AdamW", "params": {"betas": [0.9]}}, "betas"),
        ({"type": "AdamW", "params": {"betas": [0.9, 1.0]}}, "betas"),
        ({"type": "AdamW", "params": {"eps": 0}}, "eps"),
        ({"type": "AdamW", "params": [1]}, "params"),
        ([], "optimizer"),
    ],
)
def test_other_optimizers_are_refused(block: Any, part: str) -> None:
    assert part in refused({"optimizer": block})


def zero(**settings: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 3} | settings}


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler"),
        (zero(offload_optimizer={"device": "nvme"}), "zero_optimization.offload_optimizer.device"),
        (zero(offload_param={"device": "nvme"}), "zero_optimization.offload_param.device"),
        (zero(offload_optimizer={"device": "cpu", "ratio": 0.3}), "ratio"),
        (zero(offload_optimizer={"device": "cpu", "super_offload": True}), "super_offload"),
        (zero(zero_hpz_partition_size=8), "zero_hpz_partition_size"),
        (zero(zero_quantized_weights=True), "zero_quantized_weights"),
        (zero(zero_quantized_gradients=True), "zero_quantized_gradients"),
        (zero(leaf_module={"classes": ["Block"]}), "leaf_module"),
        (zero(zenflow={"topk_ratio": 0.1}), "zenflow"),
        (zero(mics_shard_size=2), "mics_shard_size"),
        (zero(stage=4), "zero_optimization.stage"),
        (zero(stage="auto"), "zero_optimization.stage"),
        (zero(stage=2, offload_param={"device": "cpu"}), "offload_param"),
        (zero(stage=0, offload_optimizer={"device": "cpu"}), "offload_optimizer"),
        (zero(stage=1) | {"data_types": {"grad_accum_dtype": "fp32"}}, "grad_accum_dtype"),
        (
            {"bf16": {"enabled": "auto", "bf16_master_weights_and_grads": True}},
            "bf16_master_weights_and_grads",
        ),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel"),
        ({"pipeline": {"stages": 2}}, "pipeline"),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size"),
        ({"amp": {"enabled": True}}, "amp"),
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op"),
        ({"zero_force_ds_cpu_optimizer": True}, "zero_force_ds_cpu_optimizer"),
        ({"zero_allow_untested_optimizer": False}, "zero_allow_untested_optimizer"),
        ({"zero_optimization": 2}, "zero_optimization"),
    ],
)
def test_what_rank_changes_cannot_follow_is_refused(settings: dict[str, Any], key: str) -> None:
    message = refused(settings)
    assert key in message
    assert "; " in message


@pytest.mark.parametrize(
    "settings",
    [
        zero(offload_optimizer={"device": "none"}, zero_quantized_weights=False, zero_hpz_partition_size=1),
        zero(stage=2, offload_optimizer={"device": "cpu", "ratio": 1.0}),
        zero(stage=2) | {"data_types": {"grad_accum_dtype": "fp32"}},
        {"torch_autocast": {"enabled": False}, "sequence_parallel_size": 1, "gradient_allreduce_op": "mean"},
    ],
)
def test_the_harmless_side_of_each_refusal_passes(settings: dict[str, Any]) -> None:
    resolve(settings, options(), 2)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('{\n  "zero_optimization": {"stage": 2}, // comment\n  "x": 1\n}', ["line 2", "no comments"]),
        ('# DeepSpeed\n{"x": 1}', ["line 1", "no comments"]),
        ('{\n  "x": 1\n  "y": 2\n}', ["line 3", "not valid JSON"]),
        ('{"x": 1, "x": 2}', ["key x stands twice"]),
        ("[1]", ["no object"]),
        ("", ["not valid JSON"]),
        ("{\n", ["line 2", "not valid JSON", "correct it"]),
        ('{"x": 1,\n\n', ["line 3", "not valid JSON"]),
        ('{"\u2028": 1,\n// why\n"y": 2}', ["line 2", "no comments"]),
    ],
)
def test_broken_files_are_named_with_the_line(tmp_path: Path, text: str, parts: list[str]) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        resolve(path, options(), 1)
    assert all(part in str(caught.value) for part in [*parts, "broken.json"]), str(caught.value)


def test_a_missing_file_is_an_error() -> None:
    with pytest.raises(UserError, match=r"nowhere\.json"):
        resolve("nowhere.json", options(), 1)
