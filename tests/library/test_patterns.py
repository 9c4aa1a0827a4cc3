"""Regular expressions from outside: what is none is said, and none is matched without end."""

from __future__ import annotations

import re

import pytest

from flexlora_ds.adapter.inject import match_modules
from flexlora_ds.config import FlexLoRAConfig
from flexlora_ds.errors import UserError
from flexlora_ds.patterns import full_matches, pattern_fault

NAMES = [f"model.layers.{i}.{part}" for i in range(12) for part in ("self_attn.q_proj", "mlp.up_proj")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("(", "missing )"),
        ("*.q_proj", "nothing to repeat"),
        ("a{9999999999}", "repetition number is too large"),
        ("(" * 3_000 + ")" * 3_000, "nested too deeply"),
        ("(?L)q_proj", "'L' flag"),
    ],
    ids=["open", "star", "overflow", "deep", "flag"],
)
def test_what_is_no_regular_expression(text: str, said: str) -> None:
    assert said in (pattern_fault(text) or "")
    with pytest.raises(UserError, match="is no regular expression"):
        full_matches([text], NAMES, "somewhere")
    with pytest.raises(
        UserError, match=r"is neither a name nor a regular expression.*\(key target_modules\)"
    ):
        FlexLoRAConfig(target_modules=(text,))


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.q_proj",
        r"model\.layers\.(\d|1[01])\..*",
        "(?i).*UP_PROJ",
        "[a-z.]+[0-9].*",
        "none of them",
        r"\ud800",
    ],
)
def test_the_names_are_those_that_re_matches_whole(pattern: str) -> None:
    expected = [name for name in NAMES if re.fullmatch(pattern, name)]
    assert full_matches([pattern, "x"], NAMES, "") == [expected, []]


@pytest.mark.parametrize(
    "pattern",
    [
        r"([a-z._0-9]+)+X",
        pytest.param("(?:.*){1,60000}X", marks=pytest.mark.full),
        pytest.param("((((((.?){1000}){1000}){1000}){1000}){1000}){1000}X", marks=pytest.mark.full),
    ],
)
def test_a_match_without_end_is_refused(pattern: str) -> None:
    with pytest.raises(UserError, match=r"not matched within .*\(target_modules\); write"):
        match_modules(NAMES, ("q_proj", pattern))
