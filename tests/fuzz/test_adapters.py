"""Adapter folders that nobody wrote: a good one with other values, types and tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from flexlora_ds.peft_reading.plain import read_peft_adapter
from tests.helpers.fuzzing import answered, inputs
from tests.helpers.strange import VALUES

NAME = "base_model.model.model.layers.0.self_attn.q_proj"
GOOD: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "mine",
    "r": 2,
    "lora_alpha": 4,
    "lora_dropout": 0.0,
    "rank_pattern": {},
    "alpha_pattern": {},
    "target_modules": ["q_proj"],
    "bias": "none",
    "use_dora": False,
    "use_rslora": False,
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "modules_to_save": None,
    "layers_to_transform": None,
    "revision": None,
}
KEYS = st.sampled_from([*GOOD, "lora_bias", "layers_pattern", "a_key_of_nobody"])
PATTERNS = st.dictionaries(
    st.sampled_from(["q_proj", "(", "a{9999999999}", "^model", ".*", "(?L)x", "\ud800"]), VALUES, max_size=2
)
SHAPES = st.lists(st.integers(0, 4), min_size=0, max_size=3)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool])
TENSORS = st.dictionaries(
    st.sampled_from([f"{NAME}.lora_A.weight", f"{NAME}.lora_B.weight", f"{NAME}.base_layer.weight", "x", ""]),
    st.tuples(SHAPES, DTYPES),
    max_size=3,
)
TEXTS = st.binary(max_size=20) | st.sampled_from([b"[" * 5_000, b'{"r": 1' + b"0" * 5_000 + b"}", b"\xff"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapter")


def write(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> None:
    good = {f"{NAME}.lora_A.weight": torch.ones(2, 4), f"{NAME}.lora_B.weight": torch.ones(4, 2)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(good if tensors is None else tensors, folder / "adapter_model.safetensors")


def test_the_good_one_is_read(folder: Path) -> None:
    write(folder, GOOD)
    assert read_peft_adapter(folder).matrices["model.layers.0.self_attn.q_proj"].rank == 2


@inputs(few=60, many=5_000)
@given(st.dictionaries(KEYS, VALUES | PATTERNS, max_size=2))
def test_other_values(folder: Path, values: dict[str, Any]) -> None:
    write(folder, GOOD | values)
    answered(lambda: read_peft_adapter(folder))


@inputs(few=50, many=5_000)
@given(TENSORS)
def test_other_tensors(folder: Path, tensors: dict[str, tuple[list[int], torch.dtype]]) -> None:
    write(folder, GOOD, {name: torch.ones(shape).to(dtype) for name, (shape, dtype) in tensors.items()})
    answered(lambda: read_peft_adapter(folder))


@inputs(few=30, many=2_000)
@given(
    st.sampled_from(["adapter_config.json", "adapter_model.safetensors", "flexlora.json", "prompt.json"]),
    TEXTS,
)
def test_other_bytes(folder: Path, name: str, text: bytes) -> None:
    write(folder, GOOD)
    (folder / name).write_bytes(text)
    answered(lambda: read_peft_adapter(folder))
    (folder / name).unlink()
