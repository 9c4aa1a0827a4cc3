"""PEFT's LoRA in the same loop."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flexlora_ds.adapter.inject import linear_names, match_modules
from flexlora_ds.files.safetensors_file import save_tensors
from flexlora_ds.files.text import write_text_atomically
from flexlora_ds.partitions import MASTER, forget_construction, live_shards
from flexlora_ds.peft_format import PROMPT_FILE, prompt_note, require_finite
from flexlora_ds.rank_change import RankChange
from launch.data.batches import MicroBatch
from launch.engine.adam import AdamSettings
from launch.engine.methods.protocol import ANEW, Beginning
from launch.options.train_options import TrainOptions

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from peft import LoraConfig


class PeftLoRA:
    """PEFT's LoRA, as it comes, under the same loop, data and loss."""

    def __init__(self, options: TrainOptions) -> None:
        self.options = options
        self.matrices: list[str] = []
        self.remarks: list[str] = []
        self.doubts: list[str] = []

    @property
    def controller(self) -> None:
        """Ranks never change."""
        return None

    @property
    def constants(self) -> Mapping[str, Tensor]:
        """The trained state says it all."""
        return {}

    def adapt(self, model: nn.Module, beginning: Beginning = ANEW) -> nn.Module:
        """Wrap the model in PEFT's LoRA."""
        self.matrices = match_modules(linear_names(model), self.options.target_modules)
        return self.wrapped(model)

    def wrapped(self, model: nn.Module) -> nn.Module:
        """The model in PEFT's LoRA, drawn from the run's seed."""
        from peft import get_peft_model

        torch.manual_seed(self.options.seed)
        found: nn.Module = get_peft_model(model, self.lora_config(), autocast_adapter_dtype=False)
        return found

    def lora_config(self, **others: Any) -> LoraConfig:
        """PEFT's configuration of these options; `others` are those of a kind of LoRA."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.options.rank,
            lora_alpha=self.options.alpha,
            lora_dropout=self.options.dropout,
            target_modules=self.matrices,
            task_type="CAUSAL_LM",
            **others,
        )

    def optimizer(self, model: nn.Module, adam: AdamSettings) -> torch.optim.Optimizer:
        """torch's AdamW over all of LoRA's parameters."""
        params = [p for p in model.parameters() if p.requires_grad]
        options = self.options
        return torch.optim.AdamW(
            params, lr=options.lr, betas=adam.betas, eps=adam.eps, weight_decay=options.weight_decay
        )

    def attach(self, engine: DeepSpeedEngine, total_steps: int, validate: Callable[[], float] | None) -> None:
        """Remember the engine."""
        self.engine = engine
        forget_construction(engine)

    def before_forward(self, batch: MicroBatch, device: torch.device) -> None:
        """PEFT draws its dropout from torch's generator."""

    def after_step(self, step: int) -> RankChange | None:
        """Ranks never change."""
        return None

    def orthogonality(self) -> float | None:
        """There is no P and Q."""
        return None

    @property
    def total_rank(self) -> int:
        """Σ of the ranks of all matrices."""
        return self.options.rank * len(self.matrices)

    @property
    def trainable_parameters(self) -> int:
        """The number of trainable parameters."""
        return sum(
            getattr(p, "ds_numel", p.numel()) for p in self.engine.module.parameters() if p.requires_grad
        )

    def save(self, folder: Path, base_model: str) -> dict[str, list[float]]:
        """Write PEFT's files from the fp32 masters."""
        named = {p: n for n, p in self.engine.module.named_parameters() if p.requires_grad}
        tensors = {}
        for p, value in live_shards(self.engine).read(list(named), MASTER):
            if self.engine.global_rank == 0:
                tensors[named[p].replace(".default.", ".")] = value.detach().cpu().clone().contiguous()
        if self.engine.global_rank == 0:
            config = copy(self.engine.module.peft_config["default"])
            config.base_model_name_or_path, config.inference_mode = base_model, True
            self._write(folder, self.on_the_base(tensors, config), config)
        return {}

    def on_the_base(self, tensors: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
        """The tensors of the adapter that belongs on the base as it was loaded; may change `config` to fit."""
        return tensors

    def _write(self, folder: Path, tensors: dict[str, Tensor], config: Any) -> None:
        require_finite(tensors, str(folder))
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(folder)
        prompt = json.dumps(prompt_note(self.options.prompt, self.options.prompt_date))
        write_text_atomically(folder / PROMPT_FILE, prompt + "\n")
