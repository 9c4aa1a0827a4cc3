"""Markdown tables: columns line up, and say on which side."""

from __future__ import annotations

import pytest

from flexlora_ds.files.markdown import markdown_row, markdown_table


def test_columns_line_up() -> None:
    assert markdown_table(("task", "items"), [("boolq", "3,270"), ("piqa", "8")]) == (
        "| task  | items |\n"
        "|-------|------:|\n"
        "| boolq | 3,270 |\n"
        "| piqa  |     8 |\n"
    )  # fmt: skip


def test_text_columns_are_aligned_on_the_left() -> None:
    table = markdown_table(("file", "n", "answers"), [("a", "10", "true 50 %")], left=(0, 2))
    assert table.splitlines()[1:] == ["|------|---:|-----------|", "| a    | 10 | true 50 % |"]


def test_a_header_alone_and_its_rows_one_by_one() -> None:
    assert markdown_table(("a", "b"), []) == "| a | b |\n|---|--:|\n"
    assert markdown_row(["x", "1"]) == "| x | 1 |"


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        markdown_table(("a", "b"), [("x",)])
