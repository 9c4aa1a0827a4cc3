"""Whole runs on bases with something of their own: the loss depends on neither stage nor division of a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.helpers import training
from tests.helpers.processes import Processes
from tests.helpers.training import Place
from tests.helpers.zoo import write_model

TWO_STEPS: dict[str, Any] = {
    "target_modules": "all-linear", "max_steps": 2, "adjust_size": 0, "val_size": 4, "dropout": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return training.make_place(tmp_path_factory.mktemp("bases"))


def run(processes: Processes, place: Place, out: Path, stage: int, **options: Any) -> str:
    """What a run says, which must succeed."""
    words = place.arguments(out, stage, **{**TWO_STEPS, **options})
    for found in processes.run(training.command, words):
        assert found["code"] == 0, found["stderr"]
    return str(found["stderr"])


def test_the_bases_dropout_is_off_and_said_to_be(
    one_process: Processes, place: Place, tmp_path: Path
) -> None:
    base = write_model(tmp_path / "base", "opt", dropout=0.4, attention_dropout=0.3, layerdrop=0.4)
    for size in (2, 4):
        said = run(one_process, place, tmp_path / f"{size}", 0, model=base, micro_batch_size=size)
        assert "the base's own dropout is off" in said
        assert all(rate in said for rate in ("dropout 0.4", "attention_dropout 0.3", "layerdrop 0.4"))
    assert training.losses(tmp_path / "2") == pytest.approx(training.losses(tmp_path / "4"), rel=1e-6)


def test_a_head_of_its_own_gives_the_same_losses_at_every_stage(
    one_process: Processes, two_processes: Processes, place: Place, tmp_path: Path
) -> None:
    """The configuration says that head and embeddings are one, the checkpoint stores two."""
    base = write_model(tmp_path / "base", "qwen2")
    weights = load_file(base / "model.safetensors")
    words = weights["model.embed_tokens.weight"]
    save_file(
        {**weights, "lm_head.weight": words.flip(0).contiguous()},
        base / "model.safetensors",
        {"format": "pt"},
    )
    run(one_process, place, tmp_path / "whole", 0, model=base)
    run(two_processes, place, tmp_path / "parted", 3, model=base)
    first, *_ = expected = training.losses(tmp_path / "whole")
    assert training.losses(tmp_path / "parted") == pytest.approx(expected, rel=1e-5)
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    run(one_process, place, tmp_path / "tied", 0, model=base)
    assert abs(training.losses(tmp_path / "tied")[0] - first) > 0.1
