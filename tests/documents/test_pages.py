"""The pages themselves: links that resolve, sentences of a bearable length, blocks that are what they look like."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.helpers.markdown import anchors, blocks, links, pages
from tests.helpers.processes import ROOT
from tools.sentence_length import AT_MOST, lengths, main
from tools.sentence_length import pages as counted_pages


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", pages(), ids=name)
def test_relative_links_resolve(page: Path) -> None:
    for link in links(page):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name(page)}: {link}"
        assert not anchor or anchor in anchors(target), f"{name(page)}: {link}"


@pytest.mark.parametrize("page", pages(), ids=name)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    folders = "flexlora_ds|data_prep|launch|eval|benchmarks|tests|tools|ds_configs|docs"
    tested = "|".join(folder.name for folder in (ROOT / "tests").iterdir() if folder.is_dir())
    for path in re.findall(rf"`((?:{folders}|{tested})/[\w./-]+)`", page.read_text(encoding="utf-8")):
        assert (ROOT / path).exists() or (ROOT / "tests" / path).exists(), f"{name(page)}: {path}"


def test_the_map_of_the_readme_names_every_page() -> None:
    named = {Path(link.partition("#")[0]).name for link in links(ROOT / "README.md")}
    assert {page.name for page in (ROOT / "docs").glob("*.md")} <= named


@pytest.mark.parametrize("page", counted_pages(), ids=name)
def test_sentences_are_short_on_average(page: Path) -> None:
    counts = lengths(page.read_text(encoding="utf-8"))
    assert sum(counts) <= AT_MOST * len(counts)


def test_the_table_of_sentence_lengths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A heading of no account\n\nOne two `three four` five. Six [seven eight](x.md)\nnine!\n\n"
        "* **Ten.** Eleven twelve, e.g. thirteen.\n\n| no | table |\n\n```\nno code. No code.\n```\n"
    )
    assert lengths(page.read_text()) == [4, 4, 4]
    assert main([str(page)]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[-3:] == ["3", "4.0", "4"]
    page.write_text("word " * (AT_MOST + 1))
    assert main([str(page)]) == 1


def test_blocks_that_begin_like_json_are_json() -> None:
    found = [block for page in pages() for block in blocks(page) if block.text.startswith("{")]
    assert len(found) >= 2
    for block in found:
        json.loads(block.text)


@pytest.mark.parametrize("package", ["flexlora_ds", "data_prep", "launch", "eval"])
def test_the_architecture_draws_every_room_and_no_other(package: str) -> None:
    drawing = next(blocks(ROOT / "docs" / "architecture.md")).text
    (part,) = (part for part in drawing.split("\n\n") if part.startswith(f"{package}/"))
    columns = (line[2:24] for line in part.splitlines()[1:] if re.match(r"  \w", line))
    drawn = {name.strip(" /") for column in columns for name in column.partition("  ")[0].split(",")}
    children = [
        child for child in (ROOT / package).iterdir() if child.name not in ("__init__.py", "__pycache__")
    ]
    assert drawn == {child.stem for child in children}
