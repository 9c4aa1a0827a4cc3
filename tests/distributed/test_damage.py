"""Checkpoints that are damaged, hostile or of another run, through the training command: refused by name."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from flexlora_ds.checkpoint import files
from flexlora_ds.errors import CommandError
from flexlora_ds.files.ownership import remove
from tests.helpers import eval_tiny, training
from tests.helpers.checkpoint_samples import DAMAGE, Payload, reseal
from tests.helpers.processes import Processes
from tests.helpers.resumed_runs import assert_same_run, run_training, saving_arguments, uninterrupted_run
from tests.helpers.training import Place

LAST, BEFORE = "step_00000016", "step_00000014"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return training.make_place(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def whole(place: Place, tmp_path_factory: pytest.TempPathFactory, two_processes: Processes) -> Path:
    """A finished run with checkpoints after 7, 14 and 16 steps."""
    return uninterrupted_run({}, place, tmp_path_factory.mktemp("whole"), two_processes, "zero2")


@pytest.fixture
def out(whole: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def refused(processes: Processes, words: list[str], *, dry_run_sees: bool = True) -> str:
    """The command must end with exit code 1 and one line of process 0's, and change nothing; that line.

    So must its dry run, unless it cannot see why.
    """
    (folder,) = (Path(word.partition("=")[2]) for word in words if word.startswith("--out="))
    before = contents(folder)
    results = processes.run(training.command, words)
    assert [r["code"] for r in results] == [1, 1], results[0]["stderr"]
    errors = [line for r in results for line in r["stderr"].splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in results[0]["stderr"], results[0]["stderr"]
    if dry_run_sees:
        results = processes.run(training.command, [*words, "--dry_run=true"])
        assert [r["code"] for r in results] == [1, 1], results[0]["stdout"]
        assert errors[0] in results[0]["stderr"].splitlines()
    assert contents(folder) == before
    return errors[0]


def contents(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def test_falls_back_from_damage_and_never_starts_anew_silently(
    place: Place, whole: Path, out: Path, two_processes: Processes
) -> None:
    shard = next((out / "checkpoints" / LAST).glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    said = run_training(two_processes, saving_arguments(place, out, "zero2"))
    assert "damaged checkpoint" in said and shard.name in said and "continuing after step 14 " in said
    assert_same_run(out, whole)
    for folder in files.checkpoints_in(out / "checkpoints"):
        (folder / "state.json").write_bytes(b"")
    line = refused(two_processes, saving_arguments(place, out, "zero2"))
    assert "no valid checkpoint is left" in line and "state.json" in line


def every_damage(words: list[str], checkpoints: str) -> list[list[str]]:
    """[file, kind, folder chosen, warning] for every damage to every file of the newest checkpoint; and none left."""
    from launch.data.prepare import load_tokenizer_of, prepare_data
    from launch.distributed.process import join_processes
    from launch.loop.session import identify
    from launch.options.train_options import parse_options
    from launch.run_folder.folder import RunFolder
    from launch.run_folder.resume import find_start

    options, process = parse_options(words), join_processes()
    identity = identify(options, prepare_data(options, load_tokenizer_of(options)), process)
    newest, found = Path(checkpoints) / LAST, []
    for path in sorted(newest.iterdir()):
        whole = path.read_bytes()
        for kind, damage in DAMAGE.items():
            if kind != "a link":
                damage(path)
                start = find_start(options, RunFolder(options.out), process, identity)
                assert start.checkpoint is not None
                found.append([path.name, kind, start.checkpoint.folder.name, start.messages[0]])
                path.write_bytes(whole)
    return found


@pytest.mark.full
def test_every_damage_falls_back_to_the_checkpoint_before(
    place: Place, out: Path, one_process: Processes
) -> None:
    words = saving_arguments(place, out, "zero2")
    (found,) = one_process.run(every_damage, words, str(out / "checkpoints"), timeout=300)
    assert len(found) == 4 * (len(DAMAGE) - 1)
    for name, kind, chosen, said in found:
        assert chosen == BEFORE and name in said and "damaged checkpoint" in said, (name, kind, said)
    for name in ("manifest.json", "state.json", "state-00001-of-00002.safetensors"):
        for folder in files.checkpoints_in(out / "checkpoints"):
            (folder / name).unlink(missing_ok=True)
        (result,) = one_process.run(training.command, words)
        assert result["code"] == 1 and "no valid checkpoint is left" in result["stderr"]


def poison(folder: Path, trace: Path) -> None:
    """Put a pickle that leaves a trace in the place of the tensors, under a manifest that is true of it."""
    for path in folder.glob("*.safetensors"):
        path.write_bytes(pickle.dumps(Payload(trace)))
    reseal(folder)


def test_a_malicious_checkpoint_is_refused(
    place: Place, out: Path, tmp_path: Path, two_processes: Processes
) -> None:
    folder, trace = out / "checkpoints" / LAST, tmp_path / "ran"
    poison(folder, trace)
    line = refused(two_processes, saving_arguments(place, out, "zero2", resume=folder))
    assert "no safetensors file" in line and folder.name in line
    reseal(folder, files=[{"name": "../../ran", "size": 0, "sha256": "0"}])
    line = refused(two_processes, saving_arguments(place, out, "zero2", resume=folder))
    assert "'../../ran', which is no plain file name" in line
    assert not trace.exists()


def another_model(place: Place, folder: Path) -> dict[str, Any]:
    eval_tiny.make_model(seed=9).save_pretrained(folder)
    eval_tiny.make_tokenizer().save_pretrained(folder)
    return {"model": folder}


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"method": "lora"}, "method is flexlora in it and lora here"),
        ({"cutoff_len": 90}, "cutoff_len is 200 in it and 90 here"),
        ({"group_by_length": True}, "group_by_length is false in it and true here"),
        *(
            pytest.param(change, difference, marks=pytest.mark.full)
            for change, difference in [
                ({"rank": 6}, "rank is 4 in it and 6 here"),
                ({"seed": 7}, "seed is 42 in it and 7 here"),
                ({"batch_size": 4}, "batch_size is 8 in it and 4 here"),
                ({"target_modules": "q_proj"}, "target_modules is q_proj,k_proj,"),
                ({"importance": "sensitivity"}, "holds the optimizer states"),
                ({"max_steps": 9}, "number of steps is at 16 already in it and only 9 here"),
            ]
        ),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_the_difference(
    change: dict[str, Any], difference: str, place: Place, out: Path, two_processes: Processes
) -> None:
    without_engine = "optimizer states" not in difference
    words = saving_arguments(place, out, "zero2", **change)
    assert difference in refused(two_processes, words, dry_run_sees=without_engine)


def test_a_checkpoint_of_another_model_or_format_is_refused_with_the_difference(
    place: Place, out: Path, tmp_path: Path, two_processes: Processes
) -> None:
    other = another_model(place, tmp_path / "other")
    line = refused(two_processes, saving_arguments(place, out, "zero2", **other), dry_run_sees=False)
    assert f"base model is {place.model} in it and {other['model']} (its files differ) here" in line
    reseal(out / "checkpoints" / LAST, format=files.FORMAT + 1)
    line = refused(two_processes, saving_arguments(place, out, "zero2"))
    assert f"format version {files.FORMAT + 1}, this program reads {files.FORMAT}" in line


def test_rewinding_keeps_what_it_leaves(
    place: Place, whole: Path, out: Path, two_processes: Processes
) -> None:
    words = saving_arguments(place, out, "zero2", resume=out / "checkpoints" / "step_00000007")
    said = run_training(two_processes, words)
    assert "continuing after step 7" in said and "set_aside_step_00000014" in said
    assert_same_run(out, whole)
    again = run_training(two_processes, words)
    assert "already continued" in again and "continuing after step 16" in again


def with_a_clock_that_runs_backwards(words: list[str]) -> dict[str, Any]:
    """The training command while every look at the wall clock gives an earlier time than the last."""
    now = [time.time()]

    def earlier() -> float:
        now[0] -= 3600
        return now[0]

    with patch("time.time", earlier):
        return training.command(words)


def test_a_clock_that_goes_backwards_changes_nothing(
    place: Place, whole: Path, out: Path, two_processes: Processes
) -> None:
    """Nor do the times of files: the newest checkpoint is the one of the most steps."""
    shutil.rmtree(out / "checkpoints" / LAST)
    for age, folder in enumerate(files.checkpoints_in(out / "checkpoints")):
        for path in (folder, *folder.iterdir()):
            os.utime(path, (10_000_000 * age, 10_000_000 * age))
    results = two_processes.run(with_a_clock_that_runs_backwards, saving_arguments(place, out, "zero2"))
    assert [r["code"] for r in results] == [0, 0], results[0]["stderr"]
    assert "continuing after step 14 " in results[0]["stderr"]
    assert_same_run(out, whole)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["wall_seconds"] > 0 and summary["tokens_per_s"] > 0
    assert all(row["step_s"] > 0 for row in training.read_lines(out / "metrics.jsonl"))


def test_a_folder_in_which_none_was_ever_completed_starts_anew_and_says_so(
    place: Place, whole: Path, out: Path, two_processes: Processes
) -> None:
    shutil.rmtree(out / "checkpoints")
    (out / "checkpoints" / ".step_00000007.part").mkdir(parents=True)
    said = run_training(two_processes, saving_arguments(place, out, "zero2"))
    assert "no checkpoint was ever completed here: starting anew" in said
    assert_same_run(out, whole)


LOGS = ("metrics.jsonl", "ranks.jsonl", "validation.jsonl")


def flip_a_digit(path: Path) -> None:
    """Another loss in the first row: still JSON, and of the same length."""
    line, rest = path.read_text().split("\n", 1)
    place = line.index("loss") + line[line.index("loss") :].index(".") + 1
    path.write_text(line[:place] + str((int(line[place]) + 1) % 10) + line[place + 1 :] + "\n" + rest)


LOG_DAMAGE = {
    **{kind: damage for kind, damage in DAMAGE.items() if kind not in ("a link", "one byte short")},
    "a digit": flip_a_digit,
    "a row less": lambda path: path.write_text("".join(path.read_text().splitlines(True)[1:])),
    "a row twice": lambda path: path.write_text(path.read_text().split("\n")[0] + "\n" + path.read_text()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path))[1],
    "a folder": lambda path: (path.unlink(), path.mkdir())[1],
}


def every_log_damage(words: list[str]) -> list[list[Any]]:
    """[log, kind, what is said of it] for every damage to every log, by the search for the place to begin."""
    from launch.data.prepare import load_tokenizer_of, prepare_data
    from launch.distributed.process import join_processes
    from launch.loop.session import identify
    from launch.options.train_options import parse_options
    from launch.run_folder.resume import expect_start

    options, process = parse_options(words), join_processes()
    identity, found = identify(options, prepare_data(options, load_tokenizer_of(options)), process), []
    if not process.is_rank_zero:
        return []
    for name in LOGS:
        path = Path(options.out) / name
        whole = path.read_bytes()
        for kind, damage in LOG_DAMAGE.items():
            damage(path)
            try:
                found.append([name, kind, str(expect_start(options, identity))])
            except CommandError as error:
                found.append([name, kind, str(error)])
            remove(path)
            path.write_bytes(whole)
    found.append(["", "whole", str(expect_start(options, identity))])
    return found


def test_every_damage_to_a_log_before_the_checkpoint_is_refused_by_name(
    place: Place, out: Path, two_processes: Processes
) -> None:
    found, _ = two_processes.run(every_log_damage, saving_arguments(place, out, "zero2"), timeout=300)
    assert len(found) == 3 * len(LOG_DAMAGE) + 1
    for name, kind, said in found[:-1]:
        assert name in said and "continuing" not in said, (name, kind, said)
    assert "continuing after step 16" in found[-1][2]


def test_a_damaged_log_is_one_line_and_a_checkpoint_copied_without_logs_continues(
    place: Place, out: Path, tmp_path: Path, two_processes: Processes
) -> None:
    flip_a_digit(out / "ranks.jsonl")
    line = refused(two_processes, saving_arguments(place, out, "zero2"))
    assert "the log was changed: its first 3 rows are not those before the checkpoint" in line
    assert "ranks.jsonl" in line and "copy the checkpoint to a place of its own" in line
    copied = shutil.copytree(out / "checkpoints" / BEFORE, tmp_path / "alone" / "checkpoints" / BEFORE)
    words = saving_arguments(place, tmp_path / "next", "zero2", resume=copied)
    said = run_training(two_processes, words)
    assert "no logs beside" in said and "continuing after step 14" in said
    assert [row["step"] for row in training.read_lines(tmp_path / "next" / "metrics.jsonl")] == [15, 16]


def test_a_checkpoint_from_before_logs_were_noted_still_resumes(
    place: Place, whole: Path, out: Path, two_processes: Processes
) -> None:
    shutil.rmtree(out / "checkpoints" / LAST)
    folder = out / "checkpoints" / BEFORE
    state = json.loads((folder / "state.json").read_text())
    del state["run"]["logs"]
    files.write_json(folder / "state.json", state)
    reseal(folder)
    assert "continuing after step 14 " in run_training(two_processes, saving_arguments(place, out, "zero2"))
    assert_same_run(out, whole)
