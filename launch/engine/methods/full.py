"""Full fine-tuning: every weight of the base is trained, and the run leaves a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from flexlora_ds.files.folders import replacing_folder
from flexlora_ds.files.text import write_text_atomically
from flexlora_ds.partitions import MASTER, live_shards
from flexlora_ds.peft_format import PROMPT_FILE, prompt_note, require_finite
from launch.data.prepare import load_tokenizer_of
from launch.engine.methods.fixed import FixedMethod
from launch.engine.methods.protocol import ANEW, Beginning


class FullFineTuning(FixedMethod):
    """All weights, under the same loop, data and loss."""

    def adapt(self, model: nn.Module, beginning: Beginning = ANEW) -> nn.Module:
        """Thaw everything."""
        return model.requires_grad_(True)

    def save(self, folder: Path, base_model: str) -> dict[str, list[float]]:
        """Write a model as transformers does: weights in the dtype of the run, configuration, tokenizer, prompt."""
        model = self.engine.module
        named = {p: (name, p.dtype) for name, p in model.named_parameters()}
        tensors = {}
        for p, value in live_shards(self.engine).read(list(named), MASTER):
            if self.engine.global_rank == 0:
                name, dtype = named[p]
                tensors[name] = value.detach().to("cpu", dtype, copy=True)
        if self.engine.global_rank == 0:
            require_finite(tensors, str(folder))
            self._write(folder, tensors)
        return {}

    def _write(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        model: Any = self.engine.module
        # Other names of the same weight, as of a tied head.
        names = {id(p): name for name, p in model.named_parameters()}
        for name, p in model.named_parameters(remove_duplicate=False):
            tensors[name] = tensors[names[id(p)]]
        tensors.update((name, b.cpu()) for name, b in model.named_buffers() if name in model.state_dict())
        with replacing_folder(folder) as fresh:
            model.save_pretrained(fresh, state_dict=tensors)
            load_tokenizer_of(self.options).save_pretrained(fresh)
            prompt = json.dumps(prompt_note(self.options.prompt, self.options.prompt_date))
            write_text_atomically(fresh / PROMPT_FILE, prompt + "\n")
