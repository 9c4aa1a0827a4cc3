"""Recipes that nobody wrote: YAML's text, and the values of its keys."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.options.debug import debug_wanted
from launch.options.train_options import DEFAULT_RECIPE, SPECS, parse_options
from tests.helpers.fuzzing import answered, inputs

KEYS = st.sampled_from([spec.name for spec in SPECS])
PIECES = st.one_of(
    st.sampled_from(
        [
            *(
                "[",
                "]",
                "{",
                "}",
                "&a ",
                "*a",
                "!!binary ",
                "!!python/name:os ",
                "!!int ",
                "!!set ",
                "? ",
                "<<",
            ),
            *(
                ": ",
                "\n",
                "\n  ",
                "- ",
                "|",
                ">",
                "'",
                '"',
                "#",
                "%YAML 9",
                "---",
                "...",
                "\t",
                "\\ud800",
                "\0",
            ),
            *(
                "2026-13-45",
                "1:60",
                "0x",
                "0o9",
                ".inf",
                ".nan",
                "~",
                "yes",
                "1e999",
                "9" * 5_000,
                "[" * 200,
            ),
        ]
    ),
    KEYS,
    st.text(max_size=5),
)
TEXTS = st.lists(PIECES, max_size=15).map("".join)
LINES = st.lists(st.tuples(KEYS, TEXTS).map(": ".join), max_size=4).map("\n".join)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "mine.yaml"


@inputs(few=200, many=20_000)
@given(TEXTS | LINES)
def test_a_recipe(recipe: Path, text: str) -> None:
    recipe.write_bytes(text.encode("utf-8", "surrogatepass"))
    arguments = ["--recipe", str(recipe)]
    answered(lambda: parse_options(arguments))
    assert debug_wanted(arguments, DEFAULT_RECIPE) in (True, False)
