"""DeepSpeed JSONs that nobody wrote: a shipped one with other values, keys and types."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexlora_ds.partitions.unsupported import check_refusals
from launch.data.batch_layout import batch_layout
from launch.engine.adam import adam_settings
from launch.engine.deepspeed_check import require_accepted
from launch.engine.ds_config import resolve_ds_config
from launch.engine.ds_json import read_ds_json
from launch.options.train_options import TrainOptions
from launch.planning.memory_estimate import MemorySetting
from tests.helpers.fuzzing import answered, inputs
from tests.helpers.processes import ROOT
from tests.helpers.strange import VALUES

SHIPPED = [json.loads(path.read_text()) for path in sorted((ROOT / "ds_configs").glob("*.json"))]
PATHS = st.sampled_from(
    [
        *("train_batch_size", "gradient_clipping", "steps_per_print", "communication_data_type", "optimizer"),
        *("optimizer.type", "optimizer.params", "optimizer.params.betas", "optimizer.params.lr", "scheduler"),
        *("zero_optimization", "bf16", "fp16", "bfloat16", "fp16.enabled", "fp16.loss_scale", "bf16.enabled"),
        *(
            "zero_optimization.stage",
            "zero_optimization.reduce_bucket_size",
            "zero_optimization.overlap_comm",
        ),
        *("zero_optimization.offload_optimizer", "zero_optimization.offload_optimizer.device", "compile"),
        *("zero_optimization.offload_param.device", "zero_optimization.offload_optimizer.ratio", "pipeline"),
        *("zero_optimization.sub_group_size", "zero_optimization.zero_hpz_partition_size", "data_types"),
        *(
            "data_types.grad_accum_dtype",
            "flops_profiler",
            "comms_logger",
            "checkpoint",
            "aio",
            "timers",
            "moe",
        ),
        *(
            "activation_checkpointing",
            "gradient_predivide_factor",
            "sequence_parallel_size",
            "compile.enabled",
        ),
        *("tensorboard", "torch_autocast", "hybrid_engine", "autotuning", "elasticity", "a_key_of_nobody"),
    ]
)
WORDS = st.sampled_from(["auto", "cpu", "nvme", "none", "fp32", "2", "AdamW", {}, [], {"enabled": True}])
OPTIONS = TrainOptions(dtype="fp32")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "mine.json"


def settle_json(path: Path) -> None:
    """What `launch.planning.settle` does with the file."""
    source = read_ds_json(path)
    check_refusals(source.settings, source.origin)
    require_accepted(source)
    layout = batch_layout(OPTIONS, 2)
    MemorySetting.from_ds_config(
        source.settings, "fp32", 2, gradient_checkpointing=False, loss_chunk=None, optimizer_states=3
    )
    resolve_ds_config(source, OPTIONS, layout, "fp32", hidden_size=64)
    adam_settings(source, OPTIONS)


def put(settings: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        if not isinstance(settings.get(parent), dict):
            settings[parent] = {}
        settings = settings[parent]
    settings[last] = copy.deepcopy(value)


@inputs(few=150, many=10_000)
@given(st.sampled_from(SHIPPED), st.lists(st.tuples(PATHS, WORDS | VALUES), min_size=1, max_size=3))
def test_other_values(file: Path, shipped: dict[str, Any], changes: list[tuple[str, Any]]) -> None:
    settings = copy.deepcopy(shipped)
    for path, value in changes:
        put(settings, path, value)
    file.write_text(json.dumps(settings))
    answered(lambda: settle_json(file))


@inputs(few=50, many=5_000)
@given(st.binary(max_size=40) | st.text('{}[]":,0e1.-tfn \n', max_size=40).map(str.encode))
def test_other_text(file: Path, text: bytes) -> None:
    file.write_bytes(text)
    answered(lambda: settle_json(file))
