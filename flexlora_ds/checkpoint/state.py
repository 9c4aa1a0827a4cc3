"""Training state <-> safetensors, independent of the ZeRO stage, the offload and the number of processes.

Every process writes the whole tensors of its share of the parameters; nothing is gathered on one process. A resume
builds the model at the saved ranks (`set_ranks`), wraps it in any engine, and writes the tensors in (`restore`).
The frozen base is not in a checkpoint; its fingerprint is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from flexlora_ds.adapter.layer import AdaptedLinear, adapters
from flexlora_ds.checkpoint.files import (
    STATE,
    DamagedError,
    FileEntry,
    listed,
    seal,
    step_of,
    verify,
    write_json,
)
from flexlora_ds.checkpoint.generators import generator_states, set_generator_states
from flexlora_ds.checkpoint.schedules import continue_schedule, state_of, updates_of
from flexlora_ds.errors import RunError
from flexlora_ds.files.safetensors_file import save_tensors

_CONSTANT = "constant "
_NO_STATE = ("process ", _CONSTANT)
"""What labels begin with of tensors that are no state of a parameter."""
_NONE: Mapping[str, Tensor] = MappingProxyType({})

State = dict[str, Any]
"""The content of state.json."""

_REQUIRED = (
    "step",
    "ranks",
    "shapes",
    "keys",
    "scalars",
    "counters",
    "updates",
    "scaler",
    "controller",
    "run",
)


@dataclass(frozen=True)
class Snapshot:
    """This process's part of the training state, copied: training may go on while it is written."""

    index: int
    count: int
    tensors: Mapping[str, Tensor]
    state: State

    def write(self, folder: Path) -> list[FileEntry]:
        """Write this process's files and bring them to the disk; process 0 also writes state.json."""
        shard = folder / f"state-{self.index + 1:05d}-of-{self.count:05d}.safetensors"
        save_tensors(self.tensors, shard)
        entries = [seal(shard)]
        if self.index == 0:
            write_json(folder / STATE, self.state)
            entries.append(seal(folder / STATE))
        return entries


def take_snapshot(
    engine: Any,
    step: int,
    *,
    controller: Any = None,
    run: Mapping[str, Any],
    constants: Mapping[str, Tensor] = _NONE,
    scheduler: Any = None,
) -> Snapshot:
    """Copy the state after `step`; collective, between two steps.

    `controller`: the RankController, where ranks can change. `run`: what the caller wants back, JSON.
    `constants`: tensors that the caller wants back, by name; on the CPU, the same on every process, never changed.
    `scheduler`: of the learning rate, where it is not the engine's own.
    """
    from flexlora_ds.partitions import state_by_name

    state = {
        "step": step,
        "ranks": {} if controller is None else dict(controller.ranks),
        "shapes": state_by_name.parameter_shapes(engine),
        "keys": state_by_name.state_keys(engine),
        "scalars": state_by_name.optimizer_scalars(engine),
        "counters": state_by_name.counters(engine),
        "updates": updates_of(scheduler or engine.lr_scheduler),
        "schedule": state_of(scheduler or engine.lr_scheduler),
        "scaler": state_by_name.scaler_state(engine),
        "controller": None if controller is None else controller.state_dict(),
        "run": dict(run),
        "constants": {name: list(value.shape) for name, value in constants.items()},
    }
    index, count = int(engine.global_rank), int(engine.world_size)
    tensors = state_by_name.copy_share(engine, index, count) | generator_states(index, engine.device)
    tensors |= {f"{_CONSTANT}{n}": v for i, (n, v) in enumerate(constants.items()) if i % count == index}
    return Snapshot(index, count, tensors, state)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every byte has been checked."""

    folder: Path
    state: State
    shards: Sequence[Path]

    @property
    def step(self) -> int:
        """The step after which it was taken."""
        return int(self.state["step"])

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of every matrix; empty for methods without ranks of their own."""
        return {str(name): int(rank) for name, rank in self.state["ranks"].items()}

    @property
    def run(self) -> dict[str, Any]:
        """What the caller of `take_snapshot` stored."""
        return dict(self.state["run"])

    def require_fit(self, engine: Any) -> None:
        """Compare with a live engine before anything is written.

        Raises:
            RunError: other parameters, shapes or optimizer states.
        """
        from flexlora_ds.partitions import state_by_name

        mine, saved = state_by_name.parameter_shapes(engine), self.state["shapes"]
        for name in sorted({*mine, *saved}):
            here, there = mine.get(name), saved.get(name)
            if here != there:
                raise RunError(
                    f"the checkpoint is of another model or method: {name} is {there or 'absent'} in it "
                    f"and {here or 'absent'} here",
                    str(self.folder),
                    "use the options of its run",
                )
        wanted = getattr(engine.basic_optimizer, "state_keys", None)
        saved_keys = set(self.state["keys"]) - {"master"}
        if wanted is not None and saved_keys and saved_keys != set(wanted()):
            raise RunError(
                f"the checkpoint holds the optimizer states {sorted(saved_keys)}, this run keeps "
                f"{sorted(wanted())}",
                str(self.folder),
                "use the options of its run (importance, new_moment)",
            )

    def restore(self, engine: Any, *, controller: Any = None, scheduler: Any = None) -> None:
        """Write the state into an engine that has not taken a step; no communication.

        `scheduler`: as that of `take_snapshot`.

        Raises:
            RunError: as `require_fit`; nothing has been written then.
        """
        from flexlora_ds.partitions import state_by_name

        self.require_fit(engine)
        state_by_name.write_whole(engine, self.state["keys"], self.tensors(), self.state["scalars"])
        counters = self.state["counters"]
        micro_steps = int(counters["global_steps"]) * int(engine.gradient_accumulation_steps())
        state_by_name.set_counters(engine, counters, micro_steps)
        state_by_name.set_scaler_state(engine, self.state["scaler"])
        continue_schedule(scheduler or engine.lr_scheduler, self.state["updates"], self.state.get("schedule"))
        if controller is not None:
            controller.load_state_dict(self.state["controller"])
        set_generator_states(self._generators(int(engine.global_rank), int(engine.world_size)), engine.device)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every state by its label `<parameter>:<key>`, one at a time, on the CPU."""
        for path in self.shards:
            with safe_open(path, framework="pt") as file:
                for text in file.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                    if not text.startswith(_NO_STATE):
                        yield text, file.get_tensor(text)

    def constants(self) -> dict[str, Tensor]:
        """The `constants` of `take_snapshot`."""
        found = {}
        for path in self.shards if self.state.get("constants") else ():
            with safe_open(path, framework="pt") as file:
                names = [text for text in file.keys() if text.startswith(_CONSTANT)]  # noqa: SIM118
                found.update({text.removeprefix(_CONSTANT): file.get_tensor(text) for text in names})
        return found

    def _generators(self, index: int, count: int) -> dict[str, Tensor]:
        """This process's generator states; none where the number of processes is another."""
        if count != len(self.shards):
            return {}
        with safe_open(self.shards[index], framework="pt") as file:
            return {t: file.get_tensor(t) for t in file.keys() if t.startswith("process ")}  # noqa: SIM118


def open_checkpoint(folder: Path, *, check: bool = True) -> Checkpoint:
    """Check every byte of a checkpoint and read its state; no tensor is loaded yet.

    `check` False leaves the checksums to the process that has checked them already.

    Raises:
        DamagedError: it is not what was written, or not complete in itself. RunError: another format version.
        UserError: the folder has no checkpoint's name.
    """
    step = step_of(folder)
    files = verify(folder) if check else listed(folder)
    state = _read_state(files[STATE], folder)
    if state["step"] != step:
        raise DamagedError(f"{STATE} is of step {state['step']}", str(folder))
    shards = [path for name, path in sorted(files.items()) if name.endswith(".safetensors")]
    _require_tensors(shards, state, folder)
    return Checkpoint(folder, state, shards)


def set_ranks(model: nn.Module, ranks: Mapping[str, int]) -> None:
    """Give the adapters of a model the ranks of a checkpoint, before `deepspeed.initialize`; values are zero.

    Raises:
        RunError: other matrices, or a rank that a matrix cannot have.
    """
    layers = adapters(model)
    if list(layers) != list(ranks) and set(layers) != set(ranks):
        odd = sorted(set(layers) ^ set(ranks))
        raise RunError(
            f"the checkpoint adapts other matrices: {odd[0]} and {len(odd) - 1} more are on one side only",
            mend="use the model and target_modules of its run",
        )
    for name, layer in layers.items():
        _set_rank(layer, ranks[name])


def _set_rank(layer: AdaptedLinear, rank: int) -> None:
    limit = min(layer.in_features, layer.out_features)
    if not 1 <= rank <= limit:
        raise RunError(f"the checkpoint gives {layer.name} the rank {rank}, which is not within 1 to {limit}")
    shapes = (
        (layer.P, (layer.out_features, rank)),
        (layer.lam, (rank,)),
        (layer.Q, (rank, layer.in_features)),
    )
    for p, shape in shapes:
        p.data = torch.zeros(shape, dtype=p.dtype, device=p.device)


def _read_state(path: Path, folder: Path) -> State:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        missing = [key for key in _REQUIRED if key not in state]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DamagedError(f"{STATE} cannot be read: {type(error).__name__}", str(folder)) from None
    if missing or not isinstance(state, dict):
        raise DamagedError(f"{STATE} lacks {', '.join(missing)}", str(folder))
    return state


def _require_tensors(shards: Sequence[Path], state: State, folder: Path) -> None:
    """Every state of every parameter must be there once, in its shape."""
    expected = {f"{n}:{key}": list(shape) for n, shape in state["shapes"].items() for key in state["keys"]}
    expected.update({f"{_CONSTANT}{n}": list(s) for n, s in state.get("constants", {}).items()})
    found: dict[str, list[int]] = {}
    for path in shards:
        try:
            with safe_open(path, framework="pt") as file:
                found.update({t: list(file.get_slice(t).get_shape()) for t in file.keys()})  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise DamagedError(f"{path.name} is no safetensors file: {error}", str(folder)) from None
    found = {text: shape for text, shape in found.items() if not text.startswith("process ")}
    if found != expected:
        odd = sorted(set(found) ^ set(expected)) or [t for t in expected if found[t] != expected[t]]
        raise DamagedError(f"its tensors are not those of its {STATE}: {odd[0]}", str(folder))
