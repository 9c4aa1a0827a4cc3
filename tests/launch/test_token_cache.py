"""The cache of tokenised data: found by content, mapped, made once, whole after every kill."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexlora_ds.errors import RunError, UserError
from flexlora_ds.files import sealed
from launch.data.examples import Examples
from launch.data.token_cache import Tokenised, cache_folder, cached, content_key
from tests.helpers.chat_templates import BARE, make_tokenizer
from tests.helpers.checkpoint_samples import DAMAGE, flip_byte

HOMES = [("~/here", "here"), ("there", "../there"), ("", ".cache/flexlora_ds/tokens")]
KEY = "0123"
OPTIONS = {"prompt": "alpaca", "cutoff_len": 256}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("FLEXLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(("named", "expected"), HOMES)
def test_the_folder_is_the_one_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str, expected: str
) -> None:
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("FLEXLORA_CACHE", named)
    assert cache_folder().resolve() == (tmp_path / "home" / expected).resolve()


def make() -> Tokenised:
    rows = [(i, np.arange(i, 2 * i + 3, dtype=np.int32), np.arange(i + 3) > 1) for i in range(50) if i != 7]
    return Examples.pack(rows), (7,)


def never() -> Tokenised:
    raise AssertionError("made again")


def is_right(found: Tokenised) -> bool:
    wanted, _ = make()
    return found[1] == (7,) and list(found[0]) == list(wanted) and found[0].digest() == wanted.digest()


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_it_is_made_once_and_mapped_after_that(folder: Path) -> None:
    assert is_right(cached(KEY, make)) and kept(folder) == [KEY, f"{KEY}.lock"]
    found = cached(KEY, never)
    assert is_right(found)
    for array in (found[0]._tokens, found[0]._learnt):
        assert isinstance(array.base, np.memmap) and not array.flags.writeable
    assert found[0].target_counts.tolist() == make()[0].target_counts.tolist()
    assert list(found[0].subset(np.array([3, 1]))) == [make()[0][3], make()[0][1]]


def test_the_key_is_the_content(tmp_path: Path) -> None:
    data, copy, other = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "c.json"
    data.write_text("[1]")
    shutil.copy(data, copy)
    other.write_text("[2]")
    tokenizer = make_tokenizer()
    key = content_key(data, tokenizer, OPTIONS)
    tokenizer("the sun is a stone", max_length=3, truncation=True)  # a state that later calls do not share
    assert key == content_key(copy, make_tokenizer(), dict(reversed(OPTIONS.items())))
    more = make_tokenizer()
    more.add_tokens(["<new>"])
    keys = [
        key,
        content_key(other, tokenizer, OPTIONS),
        content_key(data, make_tokenizer(BARE), OPTIONS),
        content_key(data, make_tokenizer(eos_token="<|im_end|>"), OPTIONS),
        content_key(data, make_tokenizer(split_digits=False), OPTIONS),
        content_key(data, more, OPTIONS),
        content_key(data, tokenizer, {**OPTIONS, "cutoff_len": 128}),
    ]
    assert len(set(keys)) == len(keys)
    assert content_key(data, tokenizer, OPTIONS) == key


def run_apart(count: int, work: Callable[..., None], *arguments: Any) -> list[int | None]:
    """Run a function in `count` processes at once; their exit codes."""
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=work, args=arguments) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def _make_and_tell(log: Path) -> None:
    def slowly() -> Tokenised:
        with log.open("a") as file:
            file.write("made\n")
        time.sleep(0.3)
        return make()

    assert is_right(cached(KEY, slowly))


def test_of_many_processes_one_makes_it(folder: Path, tmp_path: Path) -> None:
    assert run_apart(6, _make_and_tell, tmp_path / "log") == [0] * 6
    assert (tmp_path / "log").read_text() == "made\n"
    assert kept(folder) == [KEY, f"{KEY}.lock"]


def _make_and_die(where: str, moment: int) -> None:
    calls = itertools.count()

    def killed(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            if next(calls) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args)

        return run

    if where == "tokenising":
        cached(KEY, killed(make))
    elif where == "writing":
        np.save = killed(np.save)
    else:
        sealed.bring_to_disk = killed(sealed.bring_to_disk)  # type: ignore[assignment]
    cached(KEY, make)


@pytest.mark.parametrize(
    ("where", "moment"), [("tokenising", 0), ("writing", 0), ("writing", 2), ("flushing", 3)]
)
def test_after_two_kills_the_next_run_is_right(folder: Path, where: str, moment: int) -> None:
    for _ in range(2):
        assert run_apart(1, _make_and_die, where, moment) == [-signal.SIGKILL]
        assert not (folder / KEY).exists(), "half an entry never has the name of a whole one"
    assert is_right(cached(KEY, make))
    assert kept(folder) == [KEY, f"{KEY}.lock"]
    assert is_right(cached(KEY, never))


def _take_the_lock_and_die(log: Path) -> None:
    def slowly() -> Tokenised:
        log.touch()
        time.sleep(60)
        return make()

    cached(KEY, slowly)


def test_who_waits_for_a_killed_maker_makes_it(folder: Path, tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    maker = fork.Process(target=_take_the_lock_and_die, args=(tmp_path / "begun",))
    maker.start()
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    waiting = fork.Process(target=_make_and_tell, args=(tmp_path / "log",))
    waiting.start()
    time.sleep(0.3)
    assert not (tmp_path / "log").exists()
    maker.kill()
    waiting.join(60)
    maker.join(60)
    assert waiting.exitcode == 0 and (tmp_path / "log").read_text() == "made\n"


FILES = ["tokens.npy", "learnt.npy", "examples.npy", "dropped.json", "seal.json"]


def test_every_damage_to_every_file_is_found_said_and_made_again(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A flipped bit in the values, too: the lengths fit, and the run would learn other targets."""
    cached(KEY, make)
    assert sorted(path.name for path in (folder / KEY).iterdir()) == sorted(FILES)
    for name, (kind, damage) in itertools.product(FILES, DAMAGE.items()):
        damage(folder / KEY / name)
        assert is_right(cached(KEY, make)) and is_right(cached(KEY, never)), (name, kind)
        said = capsys.readouterr().err
        harmless = kind == "a link" or (name == "seal.json" and "one byte" in kind)  # its final line feed
        assert "tokenised data is damaged, it is made anew" in said or harmless, (name, kind)
        assert said.count("\n") <= 1, (name, kind)


def test_a_flipped_bit_of_every_value_is_found(folder: Path) -> None:
    cached(KEY, make)
    path = folder / KEY / "tokens.npy"
    for position in range(128, path.stat().st_size, 997):
        flip_byte(position)(path)
        assert is_right(cached(KEY, make)), position


@pytest.mark.parametrize("kind", ["pipe", "folder", "mine"])
def test_something_else_in_an_entry_stays_and_does_not_hinder_a_run(folder: Path, kind: str) -> None:
    cached(KEY, make)
    (folder / KEY / "tokens.npy").unlink()
    place = folder / KEY / ("mine" if kind == "mine" else "tokens.npy")
    {"pipe": os.mkfifo, "folder": Path.mkdir, "mine": Path.touch}[kind](place)
    assert is_right(cached(KEY, make)) and is_right(cached(KEY, never))
    assert (folder / f"set_aside_{KEY}" / place.name).exists()
    (folder / KEY / "mine").touch()
    assert is_right(cached(KEY, never))


def test_an_entry_from_before_entries_were_sealed_is_made_again(folder: Path) -> None:
    cached(KEY, make)
    (folder / KEY / "seal.json").unlink()
    assert is_right(cached(KEY, make)) and is_right(cached(KEY, never))


def test_what_fails_leaves_nothing(folder: Path) -> None:
    def fail() -> Tokenised:
        raise UserError("no records")

    with pytest.raises(UserError, match="no records"):
        cached(KEY, fail)
    assert kept(folder) == [f"{KEY}.lock"]


def test_a_folder_that_cannot_be_written_is_named(folder: Path) -> None:
    folder.write_text("a file")
    with pytest.raises(RunError, match=r"cannot write the cache .*FLEXLORA_CACHE") as error:
        cached(KEY, make)
    assert str(folder) in str(error.value)


def test_nothing_kept_is_an_entry_too(folder: Path) -> None:
    for _ in range(2):
        examples, dropped = cached(KEY, lambda: (Examples.pack([]), (0, 1)))
        assert len(examples) == 0 and dropped == (0, 1)
