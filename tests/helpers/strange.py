"""Strategies for values that no one means to write: what the fuzzers put where a number, a name or a block belongs."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

WORDS = st.one_of(
    st.text(max_size=20),
    st.text(st.characters(categories=["Cs", "Cc", "Zl"]), max_size=5),
    st.integers().map(str),
    st.integers(min_value=1).map(lambda n: f"{n}" * 40),
    st.floats().map(str),
    st.sampled_from(
        ["auto", "none", "true", "-1", "0", "1", "1e300", "1e-320", "0x10", "1_0", "9" * 5_000, "a\nerror: b"]
    ),
    st.sampled_from(["(", "a{9999999999}", "(" * 3_000, "(a+)+$", "[", "*", "\\", "q_proj,", "all-linear"]),
)
"""Words of a command line."""

NUMBERS = (
    st.integers()
    | st.floats()
    | st.integers(1, 9).map(lambda n: n * 10**400)
    | st.integers(1, 9).map(lambda n: n * 10**4_000)
)

LEAVES = st.none() | st.booleans() | NUMBERS | WORDS

VALUES: st.SearchStrategy[Any] = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)
"""Values of any type that a JSON or a YAML file can hold."""
