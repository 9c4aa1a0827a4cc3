"""No door of the exports lets an adapter through whose numbers are not finite, or become so on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flexlora_ds.errors import RunError
from flexlora_ds.export import export_gguf_lora, export_merged, export_peft, export_uniform
from flexlora_ds.exports.shard_merge import ShardedBase
from flexlora_ds.peft_format import LoraAdapter, LoraMatrix, max_relative_difference
from tests.helpers.zoo import write_model

DOORS: dict[str, Callable[..., Any]] = {
    "peft": export_peft,
    "peft-uniform": export_uniform,
    "gguf-lora": export_gguf_lora,
    "merged": export_merged,
}
NAME = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base"), "llama", attention_bias=False, mlp_bias=False)


def adapter(base: Path, *, B: float = 0.1, A: float = 0.1, scale: float = 1.0) -> LoraAdapter:
    """One matrix of ordinary numbers, but for the first of B and of A."""
    matrix = LoraMatrix(torch.full((32, 2), 0.1), torch.full((2, 32), 0.1), scale)
    matrix.B[0, 0], matrix.A[0, 0] = B, A
    return LoraAdapter({NAME: matrix}, str(base))


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("worse", [{"B": float("nan")}, {"A": float("inf")}])
def test_numbers_that_are_not_finite_stay_out(
    base: Path, tmp_path: Path, door: str, worse: dict[str, float]
) -> None:
    with pytest.raises(RunError, match=r"q_proj.* holds numbers that are not finite"):
        DOORS[door](adapter(base, **worse), tmp_path / "out")
    assert not list(tmp_path.iterdir())
    DOORS[door](adapter(base), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()), "the same without them is written"


@pytest.mark.parametrize("door", ["peft-uniform", "gguf-lora"])
def test_a_scale_that_lifts_b_beyond_all_numbers_stays_out(base: Path, tmp_path: Path, door: str) -> None:
    with pytest.raises(RunError, match="holds numbers that are not finite"):
        DOORS[door](adapter(base, B=1e30, A=0.0, scale=1e20), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("whole", [False, True])
def test_a_merged_weight_beyond_its_dtype_stays_out(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    if whole:
        monkeypatch.setattr(ShardedBase, "of", lambda *_: None)
    large = adapter(base, B=1e6, A=1.0)
    with pytest.raises(RunError, match=r"q_proj.* with its update is not finite in float16; .*--dtype"):
        export_merged(large, tmp_path / "out", dtype=torch.float16)
    assert not list(tmp_path.iterdir())


def test_a_written_number_that_is_none_is_a_difference(base: Path) -> None:
    found, worse = adapter(base), adapter(base, B=float("nan"))
    both = {"other": found.matrices[NAME], NAME: worse.matrices[NAME]}
    same = {"other": found.matrices[NAME], NAME: found.matrices[NAME]}
    assert max_relative_difference(replace(found, matrices=same), replace(found, matrices=both)) == float(
        "inf"
    )
