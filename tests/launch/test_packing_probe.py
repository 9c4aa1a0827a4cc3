"""Packing where it was asked for: what cannot keep examples apart is refused, by its class or by its own logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flexlora_ds.errors import UserError
from launch.model.packed_attention import register_packed_sdpa
from launch.model.packing_probe import require_kept_apart
from launch.model.skeleton import read_skeleton
from launch.options.train_options import parse_options
from launch.planning.settle import settle
from tests.helpers import training
from tests.helpers.processes import ROOT
from tests.helpers.zoo import VOCABULARY, ZOO, make_model, write_model

SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.15,
}  # fmt: skip


def try_packing(model: Any, attention: str) -> None:
    require_kept_apart(
        model, torch.device("cpu"), torch.float32, VOCABULARY, attention, "padding_free on the command line"
    )


@pytest.mark.parametrize("kind", sorted(set(ZOO) - {"falcon"}))
def test_the_zoo_keeps_packed_examples_apart(kind: str) -> None:
    try_packing(
        make_model(kind, attn_implementation="eager" if kind == "gemma2" else register_packed_sdpa()), "sdpa"
    )


@pytest.mark.parametrize(
    ("kind", "attention", "changes"),
    [("opt", "eager", {}), ("nemotron", "sdpa", SMALL), ("doge", "sdpa", SMALL)],
)
def test_a_model_that_mixes_packed_examples_is_refused(
    kind: str, attention: str, changes: dict[str, Any]
) -> None:
    """Each takes boundaries, and computes something else with them under this attention."""
    name = "eager" if attention == "eager" else register_packed_sdpa()
    model = make_model(kind, attn_implementation=name, **changes).train()
    with pytest.raises(UserError, match=r"does not keep packed examples apart.*; leave padding_free at auto"):
        try_packing(model, attention)
    assert model.training


def write_skeleton(folder: Path, kind: str, **changes: Any) -> Path:
    """A base of which only the configuration is there, for what is decided without weights."""
    write_model(folder, kind, **changes)
    (folder / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("falcon", {}),
        ("gpt_neo", {**SMALL, "attention_types": [[["global"], 2]], "num_layers": 2}),
        ("lfm2", {**SMALL, "layer_types": ["conv", "full_attention"]}),
        ("minimax", {**SMALL, "layer_types": ["linear_attention", "full_attention"], "num_local_experts": 2}),
    ],
)
def test_it_is_said_before_the_weights_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, changes: dict[str, Any]
) -> None:
    monkeypatch.chdir(ROOT)
    place = training.make_place(tmp_path, records=8)
    model = write_skeleton(tmp_path / "base", kind, **changes)
    asked = place.arguments("unused", model=model, target_modules="all-linear", padding_free=True)
    with pytest.raises(UserError, match=r"cannot keep packed examples apart \(--padding_free"):
        settle(parse_options(asked), 1)
    left = place.arguments("unused", model=model, target_modules="all-linear")
    assert settle(parse_options(left), 1).computation.packed is False


def test_attention_with_boundaries_passes(tmp_path: Path) -> None:
    for kind in ("gpt2", "mixtral", "gemma3_text"):
        assert read_skeleton(str(write_skeleton(tmp_path / kind, kind)), ("all-linear",)).separable
    settings = json.loads((tmp_path / "gemma3_text" / "config.json").read_text())
    assert set(settings["layer_types"]) <= {"sliding_attention", "full_attention"}
