"""A small checkpoint on disk, and what damage or an attacker makes of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from flexlora_ds.checkpoint import files
from flexlora_ds.checkpoint.state import Snapshot

SHAPES = {"a.P": [4, 2], "a.lam": [2], "b.P": [3, 1]}
KEYS = ["exp_avg", "master"]


def make_snapshots(step: int, count: int = 2) -> list[Snapshot]:
    """What `count` processes would write."""
    state = {
        "step": step,
        "ranks": {"a": 2, "b": 1},
        "shapes": SHAPES,
        "keys": KEYS,
        "scalars": {},
        "counters": {},
        "updates": step,
        "scaler": None,
        "controller": None,
        "run": {"note": "λ"},
    }
    shares: list[dict[str, torch.Tensor]] = [{} for _ in range(count)]
    for i, (name, shape) in enumerate(SHAPES.items()):
        for key in KEYS:
            shares[i % count][f"{name}:{key}"] = torch.randn(shape)
    return [Snapshot(i, count, share, state) for i, share in enumerate(shares)]


def save_checkpoint(root: Path, step: int) -> Path:
    """Write the checkpoint of one step."""
    part = files.begin(root, step)
    return files.commit(part, [entry for s in make_snapshots(step) for entry in s.write(part)])


def flip_byte(position: int) -> Callable[[Path], None]:
    """What turns the lowest bit of one byte of a file; negative positions count from its end."""

    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[position % len(data)] ^= 1
        path.write_bytes(data)

    return change


def shorten(kept: Callable[[int], int]) -> Callable[[Path], None]:
    """What leaves the first bytes of a file, as many as `kept` says of its size."""
    return lambda path: path.write_bytes(path.read_bytes()[: kept(path.stat().st_size)])


DAMAGE: dict[str, Callable[[Path], None]] = {
    "emptied": shorten(lambda size: 0),
    "half": shorten(lambda size: size // 2),
    "one byte short": shorten(lambda size: size - 1),
    "one byte more": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "first byte": flip_byte(0),
    "a byte in the middle": flip_byte(101),
    "last byte": flip_byte(-1),
    "deleted": Path.unlink,
    "a link": lambda path: (
        path.rename(path.with_suffix(".moved")),
        path.symlink_to(path.with_suffix(".moved")),
    )[1],
}
"""Ways to damage a file, by name."""


def reseal(folder: Path, **changes: Any) -> None:
    """Write a manifest that is true of the files as they are now: an attacker's."""
    entries = [files.seal(path) for path in sorted(folder.iterdir()) if path.name != files.MANIFEST]
    body = {"format": files.FORMAT, "files": [vars(entry) for entry in entries], **changes}
    files.write_json(folder / files.MANIFEST, {**body, "sha256": files._digest(body)})


class Payload:
    """Unpickled, it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)
