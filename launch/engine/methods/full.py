"""Full fine-tuning: every weight of the base is trained, and the run leaves a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flexlora_ds.files.folders import replacing_folder
from flexlora_ds.files.text import write_text_atomically
from flexlora_ds.partitions import MASTER, forget_construction, live_shards
from flexlora_ds.peft_format import PROMPT_FILE, prompt_note, require_finite
from flexlora_ds.rank_change import RankChange
from launch.data.batches import MicroBatch
from launch.data.prepare import load_tokenizer_of
from launch.engine.adam import AdamSettings
from launch.engine.methods.protocol import ANEW, Beginning
from launch.options.train_options import TrainOptions

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class FullFineTuning:
    """All weights, under the same loop, data and loss."""

    def __init__(self, options: TrainOptions) -> None:
        self.options = options
        self.matrices: list[str] = []
        self.remarks: list[str] = []
        self.doubts: list[str] = []

    @property
    def controller(self) -> None:
        """There are no ranks."""
        return None

    @property
    def constants(self) -> Mapping[str, Tensor]:
        """The trained state says it all."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The trained state says it all."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Nothing to continue."""

    def adapt(self, model: nn.Module, beginning: Beginning = ANEW) -> nn.Module:
        """Thaw everything."""
        return model.requires_grad_(True)

    def optimizer(self, model: nn.Module, adam: AdamSettings) -> torch.optim.Optimizer:
        """torch's AdamW over all weights."""
        options = self.options
        return torch.optim.AdamW(
            model.parameters(),
            lr=options.lr,
            betas=adam.betas,
            eps=adam.eps,
            weight_decay=options.weight_decay,
        )

    def attach(self, engine: DeepSpeedEngine, total_steps: int, validate: Callable[[], float] | None) -> None:
        """Remember the engine."""
        self.engine = engine
        forget_construction(engine)

    def before_forward(self, batch: MicroBatch, device: torch.device) -> None:
        """Nothing is seeded by records."""

    def after_step(self, step: int) -> RankChange | None:
        """There are no ranks."""
        return None

    def orthogonality(self) -> float | None:
        """There is no P and Q."""
        return None

    @property
    def total_rank(self) -> int:
        """There are no ranks."""
        return 0

    @property
    def trainable_parameters(self) -> int:
        """All, each counted once."""
        return sum(getattr(p, "ds_numel", p.numel()) for p in self.engine.module.parameters())

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
