"""DeepSpeed's own refusals of a JSON: one line with the dotted key, before anything is loaded."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from flexlora_ds.errors import UserError
from flexlora_ds.partitions.unsupported import check_refusals
from launch.engine.deepspeed_check import late_refusals, require_accepted
from launch.engine.ds_json import read_ds_json

AUTOS = {"train_batch_size": "auto", "gradient_clipping": "auto", "fp16": {"enabled": "auto"}}


def refusal(settings: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        require_accepted(read_ds_json({**AUTOS, **settings}))
    line = str(caught.value)
    assert line.startswith("DeepSpeed refuses ") and "\n" not in line and len(line) < 600
    return line


@pytest.mark.parametrize(
    ("settings", "key", "words"),
    [
        ({"bf16": {"enabled": "auto", "loss_scale": 0, "hysteresis": 2}}, "bf16.loss_scale", "not permitted"),
        ({"compile": {"enabled": True, "backend": "inductor"}}, "compile.enabled", "not permitted"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "big"}}, ".reduce_bucket_size", "integer"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"pin_memory": True, "device": "gpu"}}},
            "zero_optimization.offload_param.device",
            "'cpu'",
        ),
        ({"comms_logger": [1]}, "comms_logger", "refuses [1]: it expects an object there"),
        ({"flops_profiler": 3}, "flops_profiler", "it expects an object there"),
        ({"communication_data_type": "int4"}, "communication_data_type", "Supported data types"),
        ({"fp16": {"enabled": "auto", "loss_scale": "high"}}, "fp16.loss_scale", "must be a number"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_key_is_named(settings: dict[str, Any], key: str, words: str) -> None:
    line = refusal(settings)
    assert f"{key}); correct or remove it" in line and words in line


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"steps_per_print": "x"},
            "'x' is not allowed (DeepSpeed config, key steps_per_print); give a number above 0",
        ),
        ({"gradient_predivide_factor": 0}, "0 is out of range"),
        ({"log_level": "1"}, "key log_level); give 'debug', 'info'"),
        ({"wall_clock_breakdown": [1]}, "key wall_clock_breakdown); give true or false"),
        ({"data_types": {"grad_accum_dtype": "int8"}}, "key data_types.grad_accum_dtype"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_deepspeed_reads_without_looking(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        require_accepted(read_ds_json(settings))
    assert said in str(caught.value)


@pytest.mark.parametrize("steps", [math.inf, 2_000, 1e5, None])
def test_steps_between_lines_as_files_have_them(steps: float | None) -> None:
    require_accepted(read_ds_json({**AUTOS, "steps_per_print": steps}))


@pytest.mark.parametrize("monitor", ["tensorboard", "wandb", "comet"])
def test_a_monitor_needs_its_package(monkeypatch: pytest.MonkeyPatch, monitor: str) -> None:
    monkeypatch.setattr("launch.engine.deepspeed_check.find_spec", lambda name: None)
    require_accepted(read_ds_json({monitor: {"enabled": False}, "csv_monitor": {"enabled": True}}))
    with pytest.raises(UserError, match=rf"is not installed .*key {monitor}\.enabled\); install it"):
        require_accepted(read_ds_json({monitor: {"enabled": True}}))


@pytest.mark.parametrize(
    ("error", "key"),
    [
        (AssertionError("pre-scale gradients is not yet supported with ZeRO-3"), "prescale_gradients"),
        (
            ValueError("zero_optimization.compute_grad_norm=false requires gradient_clipping=0"),
            "zero_optimization.compute_grad_norm",
        ),
        (ImportError("`comet_ml` must have at least version 3.41.0"), "comet"),
    ],
    ids=str,
)
def test_a_refusal_while_the_engine_is_made_names_its_key(error: Exception, key: str) -> None:
    settings = {
        "prescale_gradients": True,
        "zero_optimization": {"stage": 3, "compute_grad_norm": False},
        "comet": {"enabled": True},
        "gradient_clipping": 1.0,
    }
    source = read_ds_json(settings)
    with pytest.raises(UserError) as caught, late_refusals(source):
        raise error
    assert f"{error} (DeepSpeed config, key {key}); correct or remove it" in str(caught.value)
    with pytest.raises(TypeError), late_refusals(source):
        raise TypeError("a fault of something else")


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("key", ["prescale_gradients", "gradient_predivide_factor"])
def test_scaling_beside_reduce_scatter(key: str, stage: int) -> None:
    value = True if key == "prescale_gradients" else 2.0
    check_refusals({key: value, "zero_optimization": {"stage": stage, "reduce_scatter": False}}, "x")
    check_refusals({key: value, "zero_optimization": {"stage": 1}}, "x")
    with pytest.raises(UserError, match=rf"stage {stage} cannot .*key {key}\); remove it"):
        check_refusals({key: value, "zero_optimization": {"stage": stage}}, "x")


def test_one_wrong_key_among_thousands_is_found() -> None:
    many = {f"key_{i}": i for i in range(20_000)}
    line = refusal({**many, "zero_optimization": {"stage": 2, "contiguous_gradients": []}, "z": 1})
    assert "key zero_optimization.contiguous_gradients" in line


@pytest.mark.parametrize("stage", range(4))
def test_what_deepspeed_takes_passes(stage: int) -> None:
    zero = {"stage": stage, "reduce_bucket_size": "auto", "overlap_comm": "auto"}
    mine = {"zero_optimization": zero, "wall_clock_breakdown": False, "some_future_key": {"a": [1]}}
    # The options decide these, and say more of a contradiction than DeepSpeed would.
    decided = {"train_batch_size": "x", "gradient_clipping": [], "bf16": {"enabled": 7}, "optimizer": {}}
    require_accepted(read_ds_json({**AUTOS, **mine, **decided}))


def test_a_file_of_many_keys_is_read(tmp_path: Path) -> None:
    path = tmp_path / "many.json"
    path.write_text(json.dumps({f"key_{i}": i for i in range(20_000)}))
    assert len(read_ds_json(path).settings) == 20_000


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"x": ' * 100_000, "nested too deeply"),
        ('{"x": ' * 300 + "1" + "}" * 300, "nested more than 50 levels"),
        ('{"x": 1' + "0" * 5_000 + "}", "thousands of digits"),
        (b'{"x": "\xff"}', "not UTF-8"),
    ],
    ids=["endless", "deep", "digits", "bytes"],
)
def test_what_python_cannot_read_is_a_line(tmp_path: Path, text: str | bytes, said: str) -> None:
    path = tmp_path / "mine.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=rf"{said}.*mine\.json"):
        read_ds_json(path)


def test_a_shipped_file_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default is one; a file of this name in the working directory comes first."""
    monkeypatch.chdir(tmp_path)
    assert read_ds_json("ds_configs/zero3.json").settings["zero_optimization"]["stage"] == 3
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / "ds_configs" / "zero3.json").write_text('{"mine": 1}')
    assert read_ds_json("ds_configs/zero3.json").settings == {"mine": 1}
    with pytest.raises(UserError, match="no such file"):
        read_ds_json("ds_configs/mine.json")
    with pytest.raises(UserError, match="no such file"):
        read_ds_json("other/zero3.json")


@pytest.mark.parametrize("path", ["/dev/zero", "/dev"])
def test_what_is_no_file_is_a_line(path: str) -> None:
    with pytest.raises(
        UserError, match=rf"({path}); give --ds a DeepSpeed JSON".replace("(", r"\(").replace(")", r"\)")
    ):
        read_ds_json(path)
