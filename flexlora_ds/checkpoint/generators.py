"""torch's own random generators of one process, as tensors: for what draws from them (PEFT's dropout, a model's)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def generator_states(index: int, device: torch.device) -> dict[str, Tensor]:
    """The states of this process's generators by label: `process 0:cpu`, `process 0:cuda`."""
    states = {f"process {index}:cpu": torch.get_rng_state()}
    if torch.device(device).type == "cuda":
        states[f"process {index}:cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_generator_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Continue from `generator_states`; a generator without a state keeps its seed."""
    for label, state in states.items():
        kind = label.rpartition(":")[2]
        if kind == "cpu":
            torch.set_rng_state(state)
        elif torch.device(device).type == "cuda":
            torch.cuda.set_rng_state(state, device)
