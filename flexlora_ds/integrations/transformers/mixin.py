"""What makes a trainer of any `transformers.Trainer` whose adapters' ranks change.

    class FlexLoRASFTTrainer(FlexLoRAMixin, SFTTrainer): ...

It overrides the Trainer's public methods and adds a callback. Four private ones remain, because the Trainer has no
public place for them: what a checkpoint holds beside the adapter, the two moments at which a resume reads it, and the
return to the best one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from flexlora_ds.adapter.layer import adapters
from flexlora_ds.adapter.parameter_groups import build_optimizer
from flexlora_ds.config import FlexLoRAConfig
from flexlora_ds.integrations.transformers.checkpoint import find_state, follow_state, save_state
from flexlora_ds.integrations.transformers.deepspeed_json import complete
from flexlora_ds.integrations.transformers.life import RankLife
from flexlora_ds.integrations.transformers.model import (
    adapt,
    begins_from_gradient,
    disable_dropout,
    head_groups,
)
from flexlora_ds.integrations.transformers.refusals import (
    refuse,
    refuse_another_reference,
    refuse_copies_of_weights,
)
from flexlora_ds.integrations.transformers.saving import save_adapter_files
from flexlora_ds.integrations.transformers.untrained import (
    require_applied,
    require_batches,
    require_records,
    require_taken,
)


class FlexLoRAMixin:
    """Beside a `transformers.Trainer`: `class T(FlexLoRAMixin, SFTTrainer)`; its arguments, and two more.

    The model is adapted in place unless it carries adapters already. `train()` changes ranks, and at its end the
    adapter lies in `output_dir` in PEFT's format, as it does in every checkpoint. It works in plain torch, under
    DistributedDataParallel and with a DeepSpeed configuration of ZeRO stage 0 to 3.

    Args:
        flexlora: the method's options.
        modules_to_save: modules trained whole beside the adapters, by name or the end of it; None: the task's head
            (`classifier`, `score`, `qa_outputs`), where the model has one.

    Raises:
        UserError: a setting that rank changes cannot follow, in one line.
    """

    def __init__(
        self,
        *args: Any,
        flexlora: FlexLoRAConfig,
        modules_to_save: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        self.flexlora = flexlora
        super().__init__(*args, **kwargs)
        trainer: Any = self
        refuse(trainer)
        if kwargs.get("ref_model") is None and not any(isinstance(given, nn.Module) for given in args[1:]):
            refuse_another_reference(trainer)
        # Adapters that are there may have learnt something: they keep their directions.
        from_gradient = not adapters(trainer.model) and begins_from_gradient(trainer.model, flexlora)
        self.modules_to_save = adapt(
            trainer.model, flexlora, modules_to_save, masters_elsewhere=trainer.is_deepspeed_enabled
        )
        if getattr(trainer.args, "disable_dropout", False):
            disable_dropout(trainer.model)
        self.rank_life = RankLife(trainer, from_gradient=from_gradient)
        trainer.add_callback(self.rank_life.callback)

    def create_optimizer(self, model: Any = None) -> Any:
        """Our AdamW: λ in groups of its own, an age for each element, and the head, which has `args.weight_decay`."""
        trainer: Any = self
        if trainer.optimizer is None:
            args = trainer.args
            trainer.optimizer = build_optimizer(
                trainer.model,
                self.flexlora,
                args.learning_rate,
                betas=(args.adam_beta1, args.adam_beta2),
                eps=args.adam_epsilon,
                extra_groups=head_groups(trainer.model, args.weight_decay),
            )
            complete(trainer)
        return trainer.optimizer

    def get_train_dataloader(self) -> Any:
        """The Trainer's; UserError where it has no batch, for a run without a step would look like a success."""
        trainer: Any = self
        require_records(trainer.train_dataset)
        loader = super().get_train_dataloader()  # type: ignore[misc]
        require_batches(loader)
        return loader

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> Any:
        """The next update's batches; a start from the gradient looks at the first of them beforehand."""
        if self.rank_life.has_ended:
            return [], None
        batches = self.rank_life.look_ahead(epoch_iterator, num_batches, device, super().get_batch_samples)  # type: ignore[misc]
        return super().get_batch_samples(batches, num_batches, device)  # type: ignore[misc]

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """One forward and backward pass."""
        self.rank_life.before_micro_batch(inputs)
        return super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's figures, and of a training step also Σ of the ranks and how often they changed."""
        super().log(self.rank_life.with_figures(logs), *args, **kwargs)  # type: ignore[misc]

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's `train`; at its end the adapter is saved in `output_dir`.

        Args:
            resume_from_checkpoint: as the Trainer's. The number of processes, the ZeRO stage, and whether DeepSpeed is
                used, may be others than in the run that wrote it.

        Raises:
            UserError: this trainer has trained already, there is no step to take, or the checkpoint is of other
                options. RunError: there is no training state in it, or it is damaged; or every update was skipped.
        """
        trainer: Any = self
        self.rank_life.require_new()
        refuse_copies_of_weights(trainer)
        self.rank_life.resumed = find_state(resume_from_checkpoint, trainer.args.output_dir)
        follow_state(trainer, self.rank_life.resumed)
        result = super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]
        require_taken(trainer)
        require_applied(trainer, self.rank_life.engine)
        self.save_model()
        return result

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter in PEFT's format, with the tokenizer; collective.

        Raises:
            UserError: nothing has been trained yet. RunError: it holds numbers that are not finite.
        """
        trainer: Any = self
        self.rank_life.require_engine()
        require_taken(trainer)
        save_adapter_files(trainer, Path(output_dir or trainer.args.output_dir))
        if trainer.args.push_to_hub and not _internal_call:
            trainer.push_to_hub(commit_message="Model save", revision=trainer.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """The training state, whatever the stage and the number of processes."""
        save_state(self, Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing yet: the masters are read once the optimizer is there."""

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        """Wrap the model without reading an optimizer state of the Trainer's or DeepSpeed's: there is none.

        With `auto_find_batch_size` this is done for each size that is tried, and each begins anew.
        """
        self.rank_life.begin_attempt()
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)  # type: ignore[misc]
        if resume_from_checkpoint is not None:
            super()._load_scaler(resume_from_checkpoint)  # type: ignore[misc]
        return prepared

    def _load_best_model(self) -> None:
        """Back to the ranks and values of the best checkpoint, without which `train` would save the last."""
        self.rank_life.return_to_best()
