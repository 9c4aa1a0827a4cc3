"""FlexLoRA: low-rank adapters ΔW = s · P diag(λ) Q whose rank changes while they train.

Importing this package imports no DeepSpeed. What takes an engine takes DeepSpeed's, or a `TorchEngine` in plain torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "FlexLoRAConfig",
    "RankController",
    "TorchEngine",
    "adapters",
    "build_optimizer",
    "find_checkpoint",
    "inject_adapters",
    "prepare_extensions",
    "restore_checkpoint",
    "rises_without",
    "save_adapter",
    "save_checkpoint",
    "set_ranks",
    "start_from_adapter",
    "start_from_gradient",
]

_HOMES = {
    "FlexLoRAConfig": "flexlora_ds.config",
    "RankController": "flexlora_ds.controller",
    "TorchEngine": "flexlora_ds.partitions.torch_engine",
    "adapters": "flexlora_ds.adapter.layer",
    "build_optimizer": "flexlora_ds.adapter.parameter_groups",
    "find_checkpoint": "flexlora_ds.checkpoint.own_loop",
    "inject_adapters": "flexlora_ds.adapter.inject",
    "prepare_extensions": "flexlora_ds.extensions",
    "restore_checkpoint": "flexlora_ds.checkpoint.own_loop",
    "rises_without": "flexlora_ds.worth",
    "save_adapter": "flexlora_ds.saving",
    "save_checkpoint": "flexlora_ds.checkpoint.own_loop",
    "set_ranks": "flexlora_ds.checkpoint.state",
    "start_from_adapter": "flexlora_ds.adapter_start",
    "start_from_gradient": "flexlora_ds.gradient.start",
}

if TYPE_CHECKING:
    from flexlora_ds.adapter.inject import inject_adapters
    from flexlora_ds.adapter.layer import adapters
    from flexlora_ds.adapter.parameter_groups import build_optimizer
    from flexlora_ds.adapter_start import start_from_adapter
    from flexlora_ds.checkpoint.own_loop import find_checkpoint, restore_checkpoint, save_checkpoint
    from flexlora_ds.checkpoint.state import set_ranks
    from flexlora_ds.config import FlexLoRAConfig
    from flexlora_ds.controller import RankController
    from flexlora_ds.extensions import prepare_extensions
    from flexlora_ds.gradient.start import start_from_gradient
    from flexlora_ds.partitions.torch_engine import TorchEngine
    from flexlora_ds.saving import save_adapter
    from flexlora_ds.worth import rises_without


def __getattr__(name: str) -> Any:
    """Resolve the public names on first use (PEP 562), so that `--help` needs no torch and export no DeepSpeed."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
