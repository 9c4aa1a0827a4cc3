"""Nothing is removed that is not ours: folders are replaced file by file of ours, and what else they hold stays."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from flexlora_ds.errors import UserError
from flexlora_ds.files import folders
from flexlora_ds.files.folders import replacing_folder, require_new
from flexlora_ds.files.ownership import MARKER, claim, claimed, holds_only, remove, remove_if_ours


def test_a_marker_says_what_a_folder_is_for(tmp_path: Path) -> None:
    assert not claimed(tmp_path, "run") and not claimed(tmp_path / "absent", "run")
    for purpose in ("run", "demo", "run"):
        claim(tmp_path / "new", purpose)
    assert claimed(tmp_path / "new", "run") and claimed(tmp_path / "new", "demo")
    assert not claimed(tmp_path / "new", "ru") and (tmp_path / "new" / MARKER).read_text() == "run\ndemo\n"


def test_a_link_or_a_pipe_in_the_markers_place_claims_nothing(tmp_path: Path) -> None:
    claim(tmp_path / "ours", "run")
    for name in ("link", "pipe", "folder"):
        (tmp_path / name).mkdir()
    (tmp_path / "link" / MARKER).symlink_to(tmp_path / "ours" / MARKER)
    os.mkfifo(tmp_path / "pipe" / MARKER)
    (tmp_path / "folder" / MARKER).mkdir()
    assert not any(claimed(tmp_path / name, "run") for name in ("link", "pipe", "folder"))


def test_only_what_is_ours_is_removed(tmp_path: Path) -> None:
    names = re.compile(r"state\.json")
    for name, held in (("ours", "state.json"), ("both", "state.json"), ("empty", "")):
        (tmp_path / name).mkdir()
        if held:
            (tmp_path / name / held).touch()
    (tmp_path / "both" / "mine").touch()
    (tmp_path / "link").symlink_to(tmp_path / "ours")
    (tmp_path / "file").touch()
    assert [holds_only(tmp_path / name, names) for name in ("ours", "empty", "both", "link", "file", "x")] == [
        True, True, False, False, False, False,
    ]  # fmt: skip
    assert not remove_if_ours(tmp_path / "both", names) and (tmp_path / "both" / "mine").exists()
    remove(tmp_path / "link")
    assert (tmp_path / "ours").exists()
    assert remove_if_ours(tmp_path / "ours", names) and remove_if_ours(tmp_path / "absent", names)


def write_into(folder: Path, owned: tuple[str, ...] = (), **content: str) -> None:
    with replacing_folder(folder, owned) as fresh:
        for name, text in content.items():
            (fresh / name).write_text(text)


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_a_folder_gets_new_files_and_keeps_what_is_not_ours(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    write_into(folder, config="1", prompt="1")
    (folder / "thesis").write_text("mine")
    write_into(folder, ("config", "prompt"), config="2")
    assert content(folder) == {"config": "2", "thesis": "mine"}
    with pytest.raises(ZeroDivisionError), replacing_folder(folder) as fresh:
        (fresh / "config").write_text("3")
        1 / 0  # noqa: B018
    assert content(folder) == {"config": "2", "thesis": "mine"}
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("name", [".adapter.old", ".adapter.new-1", f".adapter{MARKER}-abc"])
def test_scratch_folders_of_others_stay(tmp_path: Path, name: str) -> None:
    mine = tmp_path / name / "old" / "mine"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    for _ in range(2):
        write_into(tmp_path / "adapter", config="1")
    assert mine.read_text() == "mine"


def test_what_a_killed_replacement_left_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "adapter [1]"
    write_into(folder, config="1", thesis="mine")
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(folders, "_put_back", lambda *_: os._exit(9))
        write_into(folder, ("config",), config="2")
    os.waitpid(child, 0)
    assert content(folder) == {"config": "2"} and len(list(tmp_path.iterdir())) == 2
    write_into(folder, ("config",), config="3")
    assert content(folder) == {"config": "3", "thesis": "mine"}
    assert list(tmp_path.iterdir()) == [folder]


def test_another_process_may_write_the_same_folder_at_once(tmp_path: Path) -> None:
    with replacing_folder(tmp_path / "out") as one:
        (one / "a").write_text("one")
        write_into(tmp_path / "out", b="other")
    assert content(tmp_path / "out") == {"a": "one", "b": "other"}


def test_a_file_where_a_folder_is_to_be_written_stays(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match="a file where a folder is to be written"):
        write_into(tmp_path / "out", a="1")
    for path in (tmp_path, tmp_path / "out"):
        with pytest.raises(UserError, match="exists and is not empty"):
            require_new(path, "--out")
    assert (tmp_path / "out").read_text() == "mine"
