"""Tokenised data on disk: made once on a machine, found again by content, mapped into memory by every process.

An entry is a folder named by a hash of all that its content depends on. It is written aside and renamed, so a folder
with that name was whole once. Every use compares its files with the sizes and SHA-256 that were written last: an entry
that was damaged since is made anew. Who makes it holds a lock that the kernel releases when its process dies; the
others wait for the lock and then find the entry.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from flexlora_ds.errors import RunError
from flexlora_ds.files.hashing import sha256_of
from flexlora_ds.files.lock import locked
from flexlora_ds.files.ownership import remove_if_ours, set_aside
from flexlora_ds.files.reading import JSON_FAULTS
from flexlora_ds.files.sealed import broken_seal, seal_folder
from flexlora_ds.home import at_home
from flexlora_ds.terminal.command import is_rank_zero
from launch.data.examples import Examples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


FOLDER = "FLEXLORA_CACHE"
"""The environment variable that names the folder of the cache."""

_FORMAT = 1
_LIBRARIES = ("tokenizers", "transformers")
_CHUNK = 1 << 22  # bytes
_OURS = re.compile(r"(tokens|learnt|examples)\.npy|(dropped|seal)\.json")
"""The files of an entry."""

Tokenised: TypeAlias = "tuple[Examples, tuple[int, ...]]"
"""The examples, and the ids of the records that were dropped."""


def cache_folder() -> Path:
    """`$FLEXLORA_CACHE`, else `flexlora_ds/tokens` where the user's caches are. RunError where there is no home."""
    if os.environ.get(FOLDER):
        return Path(at_home(os.environ[FOLDER]))
    try:
        caches = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    except RuntimeError:  # a user without a home, as in some containers
        raise RunError(
            "no home folder for the cache of tokenised data", FOLDER, "name a folder there"
        ) from None
    return Path(caches) / "flexlora_ds" / "tokens"


def content_key(data: Path, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> str:
    """32 hex digits over the data file's bytes, the tokenizer's content, its library's versions and the options."""
    digest = hashlib.sha256()
    with data.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    versions = {name: metadata.version(name) for name in _LIBRARIES}
    said = {"format": _FORMAT, "versions": versions, "options": dict(options)}
    digest.update(json.dumps([said, _tokenizer_content(tokenizer)], sort_keys=True).encode())
    return digest.hexdigest()[:32]


def cached(key: str, make: Callable[[], Tokenised]) -> Tokenised:
    """The entry of `key`, made by this process if it is not there and no other process is making it.

    Raises RunError where the cache cannot be written, and whatever `make` raises; nothing is left then.
    """
    root = cache_folder()
    found = _open(root / key)
    if found is not None:
        return found
    try:
        root.mkdir(parents=True, exist_ok=True)
        # Where a file system has no locks several may make the entry, and the first rename counts.
        with locked(root / f"{key}.lock", _say_waiting):
            return _open(root / key) or _make(root, key, make)
    except OSError as error:
        raise RunError(
            f"cannot write the cache of tokenised data: {error.strerror or error}",
            str(root),
            f"free some space, or name another folder in the environment variable {FOLDER}",
        ) from error


def _make(root: Path, key: str, make: Callable[[], Tokenised]) -> Tokenised:
    """Make the entry, as the one process of this machine that does."""
    host = socket.gethostname()
    entry = root / key
    if os.path.lexists(entry):
        _say(f"warning: tokenised data is damaged, it is made anew: {broken_seal(entry)} ({entry})")
    for left in (entry, *root.glob(f"{key}.{host}.*.part")):  # damaged, or of a killed process
        if not remove_if_ours(left, _OURS):
            set_aside(left)
    examples, dropped = make()
    part = root / f"{key}.{host}.{os.getpid()}.part"
    try:
        part.mkdir()
        examples.save(part)
        (part / "dropped.json").write_text(json.dumps(dropped))
        seal_folder(part)
        with contextlib.suppress(OSError):  # another machine was quicker, in a folder that both see
            part.rename(entry)
    finally:
        remove_if_ours(part, _OURS)
    return _open(entry) or (examples, dropped)


def _open(folder: Path) -> Tokenised | None:
    """The entry, every byte of it checked, or None where there is none or it is damaged."""
    if not folder.exists() or broken_seal(folder) is not None:
        return None
    try:
        dropped = tuple(json.loads((folder / "dropped.json").read_text()))
        return Examples.open(folder), dropped
    except (OSError, *JSON_FAULTS):
        return None


def _say(text: str) -> None:
    if is_rank_zero():
        print(text, file=sys.stderr, flush=True)


def _say_waiting(holder: str) -> None:
    _say(f"waiting for {holder}, which tokenises the same data")


def _tokenizer_content(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """All that decides which ids a text gets: the fast tokenizer's own JSON, or else the files it would be saved in."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    said = [type(tokenizer).__name__, repr(tokenizer.special_tokens_map), str(tokenizer.chat_template)]
    if backend is not None:
        tokenizer("")  # undoes the truncation and padding that an earlier call may have left in the backend
        return [*said, hashlib.sha256(backend.to_str().encode()).hexdigest()]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return [*said, *(sha256_of(path) for path in files)]
