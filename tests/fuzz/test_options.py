"""Option values and command lines that nobody wrote."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from flexlora_ds.config import FlexLoRAConfig
from flexlora_ds.fields import option_specs
from launch.options.train_options import SPECS, TrainOptions, parse_options
from tests.helpers.fuzzing import answered, inputs
from tests.helpers.strange import VALUES, WORDS

KEYS = st.sampled_from([spec.name for spec in SPECS])
OF_THE_METHOD = st.sampled_from([spec.name for spec in option_specs(FlexLoRAConfig)])


@inputs(few=150, many=20_000)
@given(st.lists(st.tuples(KEYS, WORDS), max_size=4))
def test_a_command_line(pairs: list[tuple[str, str]]) -> None:
    answered(lambda: parse_options([f"--{key}={word}" for key, word in pairs]))


@inputs(few=50, many=5_000)
@given(st.lists(WORDS | KEYS.map("--{}".format), max_size=5))
def test_words_in_any_order(words: list[str]) -> None:
    answered(lambda: parse_options(words))


@inputs(few=100, many=20_000)
@given(st.dictionaries(KEYS, VALUES, max_size=3))
def test_values_of_any_type(values: dict[str, Any]) -> None:
    answered(lambda: TrainOptions(**values))


@inputs(few=100, many=20_000)
@given(st.dictionaries(OF_THE_METHOD, VALUES, max_size=3))
def test_values_of_any_type_in_the_library(values: dict[str, Any]) -> None:
    answered(lambda: FlexLoRAConfig.from_dict(values))
