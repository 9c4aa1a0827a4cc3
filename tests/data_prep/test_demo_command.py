"""`python -m data_prep --demo`, end to end."""

from __future__ import annotations

from pathlib import Path

from data_prep.__main__ import main
from data_prep.published.files import CORPUS, PUBLISHED

FILES = {*PUBLISHED, "manifest.json"}


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_demo_needs_no_files_and_depends_on_its_seed(tmp_path: Path) -> None:
    for name, seed in (("a", []), ("b", ["--seed", "7"])):
        assert main(["--demo", "--out", str(tmp_path / name), *seed]) == 0
        assert set(snapshot(tmp_path / name)) == FILES
    assert (tmp_path / "a" / CORPUS).read_bytes() != (tmp_path / "b" / CORPUS).read_bytes()
    before = snapshot(tmp_path / "a")
    assert main(["--demo", "--out", str(tmp_path / "a")]) == 0
    assert snapshot(tmp_path / "a") == before
