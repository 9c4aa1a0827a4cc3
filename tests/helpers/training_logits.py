"""The training command, with the logits of the live engine kept at its end."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from tests.helpers import training

IDS = torch.arange(3, 3 + 4 * 24).view(4, 24)
TRAINING_LOGITS = "training_logits.safetensors"
"""In the run folder: `logits` [4, 24, vocabulary] of `IDS`."""


def with_logits(arguments: list[str]) -> dict[str, Any]:
    """The command in a process of the tests; when the engine saves what it trained, its logits go to the run folder."""
    from unittest.mock import patch

    from safetensors.torch import save_file

    from launch.engine.methods.flexlora import FlexLoRA
    from launch.engine.methods.full import FullFineTuning
    from launch.engine.methods.peft_adapter import PeftAdapter

    def saving(original: Any) -> Any:
        def save(self: Any, folder: Path, base_model: str) -> Any:
            flexlora = isinstance(self, FlexLoRA)
            engine = self.controller.engine if flexlora else self.engine
            engine.eval()
            with torch.no_grad():
                logits = engine(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False).logits
            if engine.global_rank == 0:
                save_file({"logits": logits.contiguous()}, folder.parent / TRAINING_LOGITS)
            return original(self, folder, base_model)

        return save

    with ExitStack() as patched:
        for kind in (FlexLoRA, PeftAdapter, FullFineTuning):
            patched.enter_context(patch.object(kind, "save", saving(kind.save)))
        return training.command(arguments)
