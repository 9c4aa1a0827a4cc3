"""The life of ranks in a trainer: from the first step to the last, beside the Trainer's loop."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback

from flexlora_ds.adapter.layer import forward_context
from flexlora_ds.adapter.running_statistics import write_buffers
from flexlora_ds.checkpoint.live import return_to
from flexlora_ds.checkpoint.state import Checkpoint
from flexlora_ds.controller import RankController
from flexlora_ds.errors import UserError
from flexlora_ds.integrations.transformers.checkpoint import find_state, restore_state
from flexlora_ds.integrations.transformers.engine import count_update, engine_of
from flexlora_ds.integrations.transformers.first_batches import start_on, take
from flexlora_ds.integrations.transformers.folds import folds_of_rows
from flexlora_ds.integrations.transformers.untrained import require_steps
from flexlora_ds.rank_changes.record import RankChange

GetBatches = Callable[[Iterator[Any], int, Any], Any]
"""The Trainer's `get_batch_samples`."""


@dataclass(frozen=True)
class Beginning:
    """What a trainer began with, for another attempt at a smaller batch size."""

    optimizer: Any
    """The one that it was given, or None."""
    values: Mapping[nn.Parameter, Tensor]
    """Of all that is trained."""


class RankLife:
    """Holds the engine and the controller while a trainer trains, and what they did.

    Attributes:
        changes: every rank change so far, those before a resume too.
        resumed: the checkpoint to go on from, or None.
        from_gradient: whether the directions begin along the gradient of the first batches.
    """

    def __init__(self, trainer: Any, *, from_gradient: bool) -> None:
        self.trainer = trainer
        self.from_gradient = from_gradient
        self.callback = RankCallback(self)
        self.engine: Any = None
        self.controller: RankController | None = None
        self.changes: list[dict[str, Any]] = []
        self.resumed: Checkpoint | None = None
        self._ahead: deque[Any] = deque()
        self._looked = False
        self._micro_step = 0
        self._beginning: Beginning | None = None

    def require_new(self) -> None:
        """Raise UserError where the trainer has trained already."""
        if self.engine is not None:
            raise UserError("this trainer has trained already", "train", "make a new one")

    def require_engine(self) -> Any:
        """The engine; UserError before there is one."""
        if self.engine is None:
            raise UserError("nothing has been trained yet", "save_model", "call train first")
        return self.engine

    def begin_attempt(self) -> None:
        """Before the model is wrapped; after an attempt that ran out of memory everything is as it was before it."""
        trainer = self.trainer
        if not trainer.args.auto_find_batch_size:
            return
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        if self._beginning is None:
            self._beginning = Beginning(trainer.optimizer, {p: p.detach().clone() for p in trained})
            return
        for p, value in self._beginning.values.items():
            p.data, p.grad = value.clone(), None
        trainer.optimizer = self._beginning.optimizer
        if trainer.optimizer is not None:
            trainer.optimizer.state.clear()
        self.changes, self._looked = [], False
        self._ahead.clear()

    @property
    def has_ended(self) -> bool:
        """Whether the checkpoint is that of the last step: the Trainer would take another, to see that it is done."""
        return self.resumed is not None and self.resumed.step >= self.trainer.state.max_steps

    def begin(self, total_steps: int) -> None:
        """Before the first step, once the Trainer has wrapped the model; collective."""
        trainer = self.trainer
        require_steps(total_steps, trainer.args)
        self.engine = engine_of(trainer)
        self.controller = RankController(self.engine, trainer.flexlora, total_steps)
        if self.resumed is not None:
            self.changes = restore_state(trainer, self.resumed)

    def look_ahead(
        self, batches: Iterator[Any], count: int, device: Any, get_batches: GetBatches
    ) -> Iterator[Any]:
        """`batches`, after a start from the gradient of the first of them where one is due; collective then."""
        if not self._looked:
            self._looked = True
            if self.from_gradient and self.resumed is None:
                self._ahead = take(batches, self.trainer.flexlora.init_batches * count)
                start_on(self.trainer, self.engine, list(self._ahead), count, device, get_batches)
        return chain(_emptying(self._ahead), batches)

    def begin_update(self) -> None:
        """Before the first micro-batch of an update."""
        self._micro_step = 0

    def before_micro_batch(self, inputs: Mapping[str, Any]) -> None:
        """Tell the engine where in an update it is, and the layers whose rows they see."""
        engine, trainer = self.engine, self.trainer
        accumulation = engine.gradient_accumulation_steps()
        engine.micro_steps = trainer.state.global_step * accumulation + self._micro_step
        context = forward_context(trainer.model)
        context.row_folds = None
        if context.observer is not None:
            place = self._micro_step * engine.world_size + engine.global_rank
            context.row_folds = folds_of_rows(inputs, place, trainer.args.device)
        self._micro_step += 1

    def end_update(self) -> RankChange | None:
        """After an update: regularise, and change ranks where a change is due; collective."""
        assert self.controller is not None, "an update before training began"
        count_update(self.trainer, self.engine)
        change = self.controller.after_step(self.trainer.state.global_step)
        if change is not None:
            self.changes.append(change.to_dict())
            for text in change.warnings if self.trainer.is_world_process_zero() else ():
                warnings.warn(text, stacklevel=2)
        return change

    def return_to_best(self) -> None:
        """Make the model that of the best checkpoint; collective.

        Raises:
            RunError: it holds no training state.
        """
        best = find_state(self.trainer.state.best_model_checkpoint, self.trainer.args.output_dir)
        assert best is not None, "the Trainer names the best checkpoint before it is loaded"
        return_to(self.engine, best)
        write_buffers(self.trainer.model, best.constants())
        self.changes = best.run["rank_changes"]

    def with_figures(self, logs: dict[str, float]) -> dict[str, float]:
        """The logs of a training step with Σ of the ranks and the number of changes; others as they are."""
        if self.controller is None or "loss" not in logs:
            return logs
        return {**logs, "total_rank": self.controller.total_rank, "rank_changes": self.controller.changes}


class RankCallback(TrainerCallback):  # type: ignore[misc]
    """The Trainer's events that ranks live by."""

    def __init__(self, life: RankLife) -> None:
        self._life = life

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The model is wrapped, the optimizer there."""
        self._life.begin(state.max_steps)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The first micro-batch of an update follows."""
        self._life.begin_update()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The update is applied, `state.global_step` counted."""
        self._life.end_update()


def _emptying(queue: deque[Any]) -> Iterator[Any]:
    while queue:
        yield queue.popleft()
