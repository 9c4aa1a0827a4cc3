"""Accuracy on the commonsense tests while a model is trained: the live model answers, and nothing of it is copied."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from deepspeed import comm

from data_prep.tasks import TASKS
from eval.live import Answerer, LiveTest, evaluation_attention
from flexlora_ds.base_model.vocabulary import Vocabulary
from flexlora_ds.errors import RunError
from flexlora_ds.rounding import ceil_div
from launch.distributed.agreement import largest, on_rank_zero
from launch.distributed.process import Process
from launch.loop.lockstep import Lockstep
from launch.options.train_options import TrainOptions
from launch.run_folder.folder import RunFolder

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from transformers import PreTrainedTokenizerBase


def prepare_test(
    options: TrainOptions, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary
) -> LiveTest | None:
    """The items that the options name; None where no accuracy is asked for.

    Raises:
        UserError: a task has no file, a malformed record, or a token that the model does not know.
    """
    if not options.eval_every:
        return None
    return LiveTest(
        Path(options.eval_data or Path(options.data).parent),
        options.eval_tasks or tuple(TASKS),
        limit=options.eval_items,
        style=options.prompt,
        day=options.prompt_date,
        mode=options.eval_mode,
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        places=("eval_data", "eval_tasks"),
    )


class AccuracyLog:
    """Measures the accuracy every `every` steps and after the `last`, and writes it; collective.

    Args:
        test: None measures nothing.
        most_tokens: of a batch; as many as a training micro-batch holds are known to fit.
        interrupted: whether the processes agree to stop; collective.
        warn: gets the line of a measurement that failed.
    """

    def __init__(
        self,
        engine: DeepSpeedEngine,
        process: Process,
        folder: RunFolder,
        test: LiveTest | None,
        interrupted: Callable[[], bool],
        warn: Callable[[str], None],
        *,
        every: int,
        last: int,
        most_tokens: int,
    ) -> None:
        self._engine, self._process, self._folder, self._test = engine, process, folder, test
        self._interrupted, self._warn = interrupted, warn
        self._every, self._last, self._most_tokens = every, last, most_tokens
        sharded = engine.zero_optimization_partition_weights() and process.world_size > 1
        self._call = Lockstep(engine, process, needed=sharded)

    def before_first_step(self, done: int) -> None:
        """Before a run goes on after step `done`: what is due there and was not written."""
        if self._test is not None and done and (done == self._last or done % self._every == 0):
            # Process 0 has the log.
            written = on_rank_zero(self._process, lambda: self._folder.accuracy.read()[-1:])
            if not (written and written[0]["step"] >= done):
                self.log(done)

    def after_step(self, step: int) -> None:
        """Measure where that is due."""
        if self._test is not None and (step == self._last or step % self._every == 0):
            self.log(step)

    def log(self, step: int) -> None:
        """Measure, and write the line, unless a stop is asked for meanwhile."""
        assert self._test is not None
        started = time.perf_counter()
        correct = self._measure(self._test, step)
        if correct is None:
            return
        accuracy = self._test.accuracies(correct)
        self._folder.log_accuracy(
            {
                "step": step,
                "accuracy": accuracy,
                "average": sum(accuracy.values()) / len(accuracy),
                "items": sum(len(task.items) for task in self._test.tasks.values()),
                "protocol": self._test.protocol.label,
                "seconds": time.perf_counter() - started,
            }
        )

    def _measure(self, test: LiveTest, step: int) -> Mapping[str, int] | None:
        model: Any = self._engine.module
        dtype = next(model.parameters()).dtype
        self._engine.eval()
        with evaluation_attention(model, dtype, self._process.device):
            answerer = test.answerer(model, self._call, self._process.device)
            correct = self._answer(test, answerer, step)
        self._engine.train()
        return correct

    def _answer(self, test: LiveTest, answerer: Answerer, step: int) -> Mapping[str, int] | None:
        """Correct answers by task; the processes take the batches in turn."""
        process, correct, fault = self._process, Counter[str](), None
        # The least of all: the processes must plan the same batches.
        budget = -largest(process, [-min(self._most_tokens, answerer.default_tokens())])[0]
        batches = test.batches(answerer, budget)
        for turn in range(ceil_div(len(batches), process.world_size)):
            own = turn * process.world_size + process.rank
            try:
                for prediction in [p for batch in batches[own : own + 1] for p in answerer.answer(batch)]:
                    correct[prediction.task] += prediction.correct
            except RunError as error:
                fault = error
            self._call.finish()
            # A fault or a stop meets one process, and ends the measurement for all.
            if largest(process, [fault is not None])[0]:
                self._warn(
                    f"step {step}: the accuracy was not measured: {fault or 'see the other processes'}"
                )
                return None
            if self._interrupted():
                return None
        return self._sum(test, correct)

    def _sum(self, test: LiveTest, correct: Mapping[str, int]) -> Mapping[str, int]:
        names = list(test.tasks)
        counts = torch.tensor([correct[name] for name in names], device=self._process.device)
        comm.all_reduce(counts)  # each process has the answers of its own batches
        return dict(zip(names, counts.tolist(), strict=True))
