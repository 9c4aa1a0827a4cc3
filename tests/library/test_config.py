"""The configuration: what it accepts, what it says of what it refuses, and its way through JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlora_ds.config import CHOICES, FlexLoRAConfig
from flexlora_ds.errors import UserError

AUTO_OR_STEPS = st.just("auto") | st.integers(1, 10**6)

CONFIGS = st.builds(
    FlexLoRAConfig,
    rank=st.integers(4, 64),
    alpha=st.floats(0.1, 1e3) | st.integers(1, 100),
    dropout=st.floats(0, 0.99),
    target_modules=st.lists(st.sampled_from(["q_proj", "k_proj", r".*\.mlp\..*"]), min_size=1),
    adjust_size=st.integers(0, 100),
    adjust_start=AUTO_OR_STEPS,
    adjust_freeze=AUTO_OR_STEPS,
    adjust_interval=AUTO_OR_STEPS,
    grace=st.integers(0, 9),
    min_rank=st.integers(1, 4),
    max_rank=st.none() | st.integers(64, 200),
    new_direction_std=st.none() | st.floats(1e-6, 2),
    orth_weight=st.none() | st.floats(0, 0.5),
    init_std=st.just("unit") | st.floats(1e-6, 2),
    lambda_lr=st.just("auto") | st.floats(1e-3, 1e3),
    expand_min_energy=st.floats(0, 1),
    weight_decay=st.floats(0, 1),
    seed=st.integers(0, 2**63 - 1),
    **{
        name: st.sampled_from(
            [word for word in choices if word != "growth"]
        )  # asks for another option beside it
        for name, choices in CHOICES.items()
    },
)


@settings(max_examples=100, deadline=None)
@given(CONFIGS)
def test_json_and_dict_round_trips_are_exact(config: FlexLoRAConfig) -> None:
    assert FlexLoRAConfig.from_json(config.to_json()) == config
    assert FlexLoRAConfig.from_dict(config.to_dict()) == config
    assert set(json.loads(config.to_json())) == {field.name for field in dataclasses.fields(config)}


def test_defaults_are_the_contract() -> None:
    assert FlexLoRAConfig().to_dict() == {
        "rank": 8,
        "alpha": 16.0,
        "dropout": 0.05,
        "target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
        "importance": "entropy",
        "direction": "both",
        "new_direction": "zero_impact",
        "new_direction_std": None,
        "new_moment": "own_age",
        "schedule": "cubic",
        "adjust_size": 4,
        "adjust_start": "auto",
        "adjust_freeze": "auto",
        "adjust_interval": "auto",
        "budget": "ranks",
        "grace": 0,
        "rank_one": "neutral",
        "min_rank": 1,
        "max_rank": None,
        "spectrum": "lambda",
        "expand_min_energy": 0.0,
        "orth_form": "decoupled",
        "orth_weight": None,
        "init": "auto",
        "init_batches": 8,
        "init_std": "unit",
        "lambda_lr": "auto",
        "weight_decay": 0.0,
        "seed": 42,
    }


def test_whole_numbers_become_floats_and_lists_tuples() -> None:
    config = FlexLoRAConfig(alpha=16, target_modules=["q_proj", "v_proj", "q_proj"])  # type: ignore[arg-type]
    assert isinstance(config.alpha, float)
    assert config.target_modules == ("q_proj", "v_proj")
    assert FlexLoRAConfig(target_modules="all-linear").target_modules == ("all-linear",)  # type: ignore[arg-type]
    assert hash(config) == hash(FlexLoRAConfig(target_modules=("q_proj", "v_proj")))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"rank": 0}, ["rank 0", "at least 1"]),
        ({"rank": 8.0}, ["rank 8.0", "a whole number"]),
        ({"rank": True}, ["rank True"]),
        ({"rank": "8"}, ["rank '8'"]),
        ({"alpha": 0}, ["alpha 0", "above 0"]),
        ({"alpha": float("nan")}, ["alpha nan"]),
        ({"alpha": 10**400}, ["alpha"]),
        ({"dropout": 1.0}, ["dropout 1.0", "below 1"]),
        ({"adjust_interval": 0}, ["adjust_interval 0", "'auto'"]),
        ({"adjust_start": "soon"}, ["adjust_start 'soon'", "'auto'"]),
        ({"importance": "entrpy"}, ["entrpy", "did you mean 'entropy'?", "nuclear"]),
        ({"schedule": "xyz"}, ["schedule 'xyz'", "cubic_fast"]),
        ({"direction": None}, ["direction", "both"]),
        ({"max_rank": 4}, ["max_rank 4", "rank 8"]),
        ({"min_rank": 9}, ["min_rank 9", "rank 8"]),
        ({"orth_weight": 0.6}, ["orth_weight 0.6", "0.5"]),
        ({"seed": 2**63}, ["seed"]),
        ({"target_modules": []}, ["target_modules"]),
        ({"target_modules": ["q_proj", 3]}, ["target_modules", "3"]),
        ({"target_modules": ["("]}, ["target_modules", "'('"]),
        ({"target_modules": ["all-linear", "q_proj"]}, ["all-linear", "alone"]),
        ({"adjust_sise": 4}, ["adjust_sise", "did you mean 'adjust_size'?"]),
        ({"zzzzzz": 4}, ["zzzzzz", "known:"]),
    ],
)
def test_refusals_name_the_key_the_value_and_the_mend(values: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        FlexLoRAConfig.from_dict(values)
    message = str(caught.value)
    assert "\n" not in message
    assert f"(key {next(iter(values))}" in message
    for part in said:
        assert part in message


@pytest.mark.parametrize("key", ["rank", "alpha", "lambda_lr", "seed"])
@pytest.mark.parametrize("number", [10**400, -(10**5_000)], ids=["401 digits", "5001 digits"])
def test_whole_numbers_that_nothing_can_hold_are_refused(key: str, number: int) -> None:
    with pytest.raises(UserError) as caught:
        FlexLoRAConfig(**{key: number})
    line = str(caught.value)
    assert line.startswith(f"{key} ") and "number" in line and len(line) < 400


def test_a_long_value_is_quoted_by_its_ends() -> None:
    with pytest.raises(UserError, match=r"^rank 'xxx+ … x+' is not allowed"):
        FlexLoRAConfig(rank="x" * 10_000_000)  # type: ignore[arg-type]


def test_a_large_orth_weight_is_refused_for_the_decoupled_form_only() -> None:
    assert FlexLoRAConfig(orth_form="squared", orth_weight=5).orth_strength == 5.0


@pytest.mark.parametrize(("text", "said"), [("{", "line 1"), ("[1]", "list"), ("{'a': 1}", "JSON")])
def test_text_that_is_no_json_object_is_refused(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        FlexLoRAConfig.from_json(text)


def test_derived_values() -> None:
    assert FlexLoRAConfig(rank=8, alpha=32).scaling == 4.0
    assert FlexLoRAConfig().orth_strength == 0.05
    assert FlexLoRAConfig(orth_form="norm").orth_strength == 0.1
    assert FlexLoRAConfig(orth_form="norm", orth_weight=0.0).orth_strength == 0.0
    assert FlexLoRAConfig(rank=8).rank_limit(4096, 1024) == 32
    assert FlexLoRAConfig(rank=8).rank_limit(20, 1024) == 20
    assert FlexLoRAConfig(rank=8, max_rank=12).rank_limit(20, 16) == 12
