"""The files of a checkpoint: complete or not there, every damage found before anything is read, nothing ever run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from flexlora_ds.base_model.fingerprint import base_fingerprint
from flexlora_ds.checkpoint import files
from flexlora_ds.checkpoint.files import DamagedError
from flexlora_ds.checkpoint.state import open_checkpoint, set_ranks
from flexlora_ds.config import FlexLoRAConfig
from flexlora_ds.errors import RunError
from tests.helpers import tiny
from tests.helpers.checkpoint_samples import (
    DAMAGE,
    Payload,
    make_snapshots,
    reseal,
    save_checkpoint,
)
from tests.helpers.processes import run_script


def test_a_checkpoint_opens_as_it_was_written(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, 7)
    assert folder.name == "step_00000007"
    assert (tmp_path / "latest").read_text().strip() == folder.name
    opened = open_checkpoint(folder)
    assert (opened.step, opened.ranks, opened.run) == (7, {"a": 2, "b": 1}, {"note": "λ"})
    assert [path.name for path in opened.shards] == [
        "state-00001-of-00002.safetensors",
        "state-00002-of-00002.safetensors",
    ]


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize(
    "name",
    ["manifest.json", "state.json", "state-00001-of-00002.safetensors", "state-00002-of-00002.safetensors"],
)
def test_every_damage_to_every_file_is_found(tmp_path: Path, kind: str, name: str) -> None:
    if (kind, name) == ("a link", "manifest.json"):
        pytest.skip("a linked manifest is read as a manifest; what it names is checked")
    folder = save_checkpoint(tmp_path, 7)
    DAMAGE[kind](folder / name)
    with pytest.raises(DamagedError):
        open_checkpoint(folder)


@pytest.mark.full
def test_every_single_flipped_byte_of_the_manifest_is_found(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, 7)
    path = folder / "manifest.json"
    original = path.read_bytes()
    for position in range(len(original)):
        for bit in (0x01, 0x20, 0xFF):
            changed = bytearray(original)
            changed[position] ^= bit
            path.write_bytes(changed)
            with pytest.raises(RunError):
                open_checkpoint(folder)


def test_a_pickle_in_place_of_tensors_is_refused_and_never_runs(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, 7)
    trace = tmp_path / "ran"
    (folder / "state-00001-of-00002.safetensors").write_bytes(pickle.dumps(Payload(trace)))
    reseal(folder)
    with pytest.raises(DamagedError, match="no safetensors file"):
        open_checkpoint(folder)
    assert not trace.exists()


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "sub/file", "..", ".hidden", "a\\b", ""])
def test_a_manifest_that_names_paths_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    folder = save_checkpoint(tmp_path, 7)
    (tmp_path / "outside").write_text("x")
    reseal(folder, files=[{"name": name, "size": 1, "sha256": "0"}])
    with pytest.raises(DamagedError, match="no plain file name"):
        open_checkpoint(folder)


def test_another_format_version_is_refused_by_name(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, 7)
    reseal(folder, format=files.FORMAT + 1)
    with pytest.raises(RunError, match=f"format version {files.FORMAT + 1}") as caught:
        open_checkpoint(folder)
    assert not isinstance(caught.value, DamagedError), "it is whole: nothing to fall back from"


@pytest.mark.parametrize("change", ["shape", "missing", "extra", "step", "field"])
def test_a_state_that_contradicts_its_tensors_is_refused(tmp_path: Path, change: str) -> None:
    folder = save_checkpoint(tmp_path, 7)
    state = json.loads((folder / "state.json").read_text())
    if change == "shape":
        state["shapes"]["a.P"] = [4, 3]
    elif change == "missing":
        state["shapes"]["c.P"] = [1, 1]
    elif change == "extra":
        del state["shapes"]["a.P"]
    elif change == "step":
        state["step"] = 8
    else:
        del state["scaler"]
    files.write_json(folder / "state.json", state)
    reseal(folder)
    with pytest.raises(DamagedError):
        open_checkpoint(folder)


def test_an_interrupted_save_is_no_checkpoint_and_is_cleared_away(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 7)
    part = files.begin(tmp_path, 9)
    make_snapshots(9)[0].write(part)
    assert [p.name for p in files.checkpoints_in(tmp_path)] == ["step_00000007"]
    save_checkpoint(tmp_path, 11)
    assert not part.exists()


def test_a_kill_at_any_operation_of_a_save_costs_no_complete_checkpoint(tmp_path: Path) -> None:
    """Step 7 is saved beside step 4, and one is kept; the process is killed before each operation."""
    (result,) = run_script(["-m", "tests.helpers.crash_points", str(tmp_path)], 1, timeout=300)
    assert result.returncode == 0, result.stderr
    count = int(result.stdout.split()[-1])
    assert count >= 25, "an open, a rename and a removal each"
    newest = []
    for number in range(1, count + 1):
        root = tmp_path / str(number)
        found = files.checkpoints_in(root)
        for folder in found:
            open_checkpoint(folder)
        newest.append(files.step_of(found[0]))
        save_checkpoint(root, 11)
        assert [p.name for p in root.iterdir() if p.name.startswith(".")] == [], number
    assert newest == sorted(newest) and set(newest) == {4, 7}


def test_everything_is_on_the_disk_before_the_checkpoint_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def noting_fsync(descriptor: int) -> None:
        done.append(("synced", Path(f"/proc/self/fd/{descriptor}").readlink().name))
        fsync(descriptor)

    def noting_rename(source: Any, target: Any, **options: Any) -> None:
        done.append(("renamed to", Path(target).name))
        rename(source, target, **options)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "rename", noting_rename)
    folder = save_checkpoint(tmp_path / "checkpoints", 7)
    appears = done.index(("renamed to", folder.name))
    synced = {name for what, name in done[:appears] if what == "synced"}
    assert synced >= {*(path.name for path in folder.iterdir()), f".{folder.name}.part", tmp_path.name}
    assert ("synced", "checkpoints") in done[appears:]
    assert ("synced", f".latest.{os.getpid()}.part") in done[appears:]
    last_file = max(
        i for i, (_, name) in enumerate(done[:appears]) if name in ("state.json", "manifest.json")
    )
    assert done[last_file] == ("synced", "manifest.json"), "the manifest comes last"


def test_the_newest_are_kept_and_never_fewer_than_one(tmp_path: Path) -> None:
    for step in (2, 10, 100_000_000):
        save_checkpoint(tmp_path, step)
    files.keep_newest(tmp_path, 2)
    assert [files.step_of(p) for p in files.checkpoints_in(tmp_path)] == [100_000_000, 10]
    files.keep_newest(tmp_path, 0)
    assert [files.step_of(p) for p in files.checkpoints_in(tmp_path)] == [100_000_000]


def test_a_checkpoint_that_holds_a_file_of_somebody_else_is_never_removed(tmp_path: Path) -> None:
    notes = save_checkpoint(tmp_path, 2) / "notes.txt"
    notes.write_text("mine")
    foreign = tmp_path / "step_20240101"
    foreign.mkdir()
    (foreign / "state.json").write_text("{}")
    for step in (4, 6):
        save_checkpoint(tmp_path, step)
    files.keep_newest(tmp_path, 1)
    assert notes.read_text() == "mine" and (foreign / "state.json").exists()
    assert [files.step_of(p) for p in files.checkpoints_in(tmp_path)] == [20240101, 2]
    save_checkpoint(tmp_path, 2)
    assert (tmp_path / "set_aside_step_00000002" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
@pytest.mark.parametrize("name", [".step_00000007.part", ".step_00000004.old", ".latest.part"])
def test_what_stands_in_the_place_of_a_scratch_folder_is_kept_and_hinders_no_save(
    tmp_path: Path, kind: str, name: str
) -> None:
    root, target = tmp_path / "checkpoints", tmp_path / "target"
    root.mkdir()
    target.mkdir()
    (target / "mine").write_text("mine")
    if kind == "file":
        (root / name).write_text("mine")
    elif kind == "folder":
        shutil.copytree(target, root / name)
    else:
        (root / name).symlink_to(target / "mine" if name == ".latest.part" else target)
    save_checkpoint(root, 7)
    assert [files.step_of(p) for p in files.checkpoints_in(root)] == [7]
    assert (root / "latest").read_text() == "step_00000007\n" and not (root / "latest").is_symlink()
    assert (target / "mine").read_text() == "mine"
    if name != ".latest.part":
        aside = root / f"set_aside_{name[1:]}"
        assert (aside if kind == "file" else aside / "mine").read_text() == "mine"


def test_later_checkpoints_are_set_aside_not_removed(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        save_checkpoint(tmp_path, step)
    assert [p.name for p in files.set_aside_after(tmp_path, 2)] == [
        "set_aside_step_00000006",
        "set_aside_step_00000004",
    ]
    assert [files.step_of(p) for p in files.checkpoints_in(tmp_path)] == [2]


def test_a_removed_checkpoint_is_remembered(tmp_path: Path) -> None:
    assert not files.ever_held_one(tmp_path)
    shutil.rmtree(save_checkpoint(tmp_path, 7))
    assert files.ever_held_one(tmp_path)


def test_ranks_are_set_before_the_engine_is_built() -> None:
    config = FlexLoRAConfig(rank=4, target_modules="all-linear")
    model = tiny.adapted_llama(config)
    from flexlora_ds import adapters

    wanted = {name: 1 + i % 6 for i, name in enumerate(adapters(model))}
    identities = [id(p) for p in model.parameters()]
    set_ranks(model, wanted)
    assert {name: layer.rank for name, layer in adapters(model).items()} == wanted
    assert identities == [id(p) for p in model.parameters()]
    for layer in adapters(model).values():
        assert layer.P.shape == (layer.out_features, layer.rank) and layer.Q.shape[0] == layer.rank
    with pytest.raises(RunError, match="rank 1000"):
        set_ranks(model, {**wanted, next(iter(wanted)): 1000})
    with pytest.raises(RunError, match="other matrices"):
        set_ranks(model, {"elsewhere": 1})


def test_a_base_is_known_by_its_content(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    first, second = tmp_path / "first", tmp_path / "elsewhere" / "second"
    model = tiny.tiny_llama()
    model.save_pretrained(first)
    LlamaForCausalLM.from_pretrained(first).save_pretrained(second)
    assert base_fingerprint(first) == base_fingerprint(second)
    tiny.tiny_llama(seed=1).save_pretrained(second)
    assert base_fingerprint(first) != base_fingerprint(second)
