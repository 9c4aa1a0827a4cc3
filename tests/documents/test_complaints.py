"""Every report that docs/complaints.md lists is the marker of a test that is there, and the other way round."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def listed() -> dict[tuple[str, str], list[str]]:
    """The reports of the page, by file and test."""
    lines = (ROOT / "docs/complaints.md").read_text().splitlines()
    rows = [line.strip("|").split(" | ") for line in lines if "`tests/" in line]
    found = {}
    for reports, *_, test in rows:
        file, name = re.findall("`([^`]+)`", test)
        found[file, name] = [report.strip() for report in reports.split(",")]
    return found


def marked() -> dict[tuple[str, str], list[str]]:
    """The reports of the tests' markers, by file and test."""
    found = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                for mark in node.decorator_list:
                    if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.complaint":
                        found[str(path.relative_to(ROOT)), node.name] = [
                            ast.literal_eval(a) for a in mark.args
                        ]
    return found


def test_page_and_markers_agree() -> None:
    assert len(listed()) > 10
    assert listed() == marked()
