"""How fast `generate` and `score` answer at the 8B shape, beside the reference's loop.

Random weights without an adapter (as with a merged one), and generated questions of commonsense lengths. Such a model
never answers, so what is compared is fixed: every contender computes 7 new tokens ("the correct answer is answer1" and
the end), the reference's loop also its published 32. `generate` is shown twice: with every token decoded in turn, and
with the logits of a scripted answer put in the place of the model's, once it has computed them: what a trained adapter
answers, so that the draft is accepted.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.eval_contenders import plan, reference
from benchmarks.eval_speed import spread_evenly
from benchmarks.gpu.clock import seconds_of, synchronise
from benchmarks.gpu.section import Conditions, Report
from benchmarks.shapes import random_model
from data_prep.build import Options, build
from data_prep.demo.sample import write_raw
from data_prep.sources import LocalSource
from data_prep.tasks import TASKS
from eval.answering.answerer import Answerer
from eval.answering.batching import Batch
from eval.answering.generate import generate_greedy
from eval.answering.shared_prefix import SharedPrefix
from eval.items import Question, TaskItems, load_questions, tokenise
from eval.model.language_model import LanguageModel
from eval.model.loading import resolve_attention
from eval.protocols import ANSWER_PREFIX, MAX_NEW_TOKENS, PROTOCOLS
from eval.run import quiet_libraries

LLAMA_ATTENTION = ("eager", "sdpa", "flash_attention_2")
"""What transformers has for the architecture of the shapes."""
NEW_TOKENS = 7
ALL_ITEMS = 22_419
END = 1


@dataclass(frozen=True)
class Size:
    """How much is asked."""

    per_task: int
    reference: int
    published: int


FULL, TINY = Size(per_task=240, reference=50, published=5), Size(per_task=6, reference=3, published=1)


def run(conditions: Conditions, report: Report) -> None:
    """Items per second of each way, and the hours that all items of the eight tasks would take."""
    quiet_libraries()
    size = TINY if conditions.tiny else FULL
    questions = questions_of(size.per_task)
    lm = model_of(conditions, tokenizer_of(questions))
    tasks = {task: tokenise(task, asked, lm.tokenizer) for task, asked in questions.items()}
    lengths = [len(item.prompt) for task in tasks.values() for item in task.items]
    report.figure("median prompt", int(statistics.median(lengths)), "tokens", items=len(lengths))
    rates: dict[str, float] = {}

    def measured(name: str, seconds: Sequence[tuple[int, float]], **details: Any) -> None:
        if not seconds:
            report.absent(name, "no time was left")
            return
        rate = sum(n for n, _ in seconds) / sum(s for _, s in seconds)
        rates[name] = rate
        report.figure(f"{name}: speed", rate, "items/s", items=sum(n for n, _ in seconds), **details)
        report.figure(f"{name}: all {ALL_ITEMS:,} items", ALL_ITEMS / rate / 3600, "h")

    def loop(name: str, count: int, tokens: int, reserve: float) -> None:
        with report.attempt(name):
            times = reference_seconds(lm, tasks, count, tokens, lambda: conditions.left > reserve)
            middle = [(1, statistics.median(times))] if times else []
            measured(name, middle, answered=len(times), each_s=times)

    def ours(name: str, mode: str, ask: Callable[[Batch], object], share: float) -> None:
        began = time.monotonic()
        room = max(conditions.left, 0.0) * share
        with report.attempt(name):
            torch.cuda.empty_cache()  # what the ways before left would make the batches smaller
            batches = plan(Answerer(lm, PROTOCOLS[mode], tasks), tasks)
            measured(name, batch_seconds(lm, batches, ask, lambda: time.monotonic() - began < room))

    short, published = (
        f"reference loop, beam 4, batch 1, {n} new tokens" for n in (NEW_TOKENS, MAX_NEW_TOKENS)
    )
    decoded, answered = (f"generate, {NEW_TOKENS} tokens in turn", "generate, answers as a trained adapter's")
    ours("score", "score", Answerer(lm, PROTOCOLS["score"], tasks).answer, 0.2)
    ours(answered, "generate", Scripted(lm, tasks).answer, 0.25)
    ours(decoded, "generate", InTurn(lm, tasks).answer, 0.3)
    loop(short, size.reference, NEW_TOKENS, reserve=8.0)
    loop(published, size.published, MAX_NEW_TOKENS, reserve=2.0)
    for name, aim in (("score", ">= 25"), (answered, ">= 15"), (decoded, "")):
        for other in (short, published):
            if name in rates and other in rates:
                hoped = aim if other == short else ""
                report.figure(f"{name} : {other}", rates[name] / rates[other], "x", aim=hoped)


def questions_of(per_task: int) -> dict[str, list[Question]]:
    """Generated questions of the eight tasks in the published prompt's clean form; repeated where there are too few."""
    with tempfile.TemporaryDirectory() as scratch:
        raw, out = Path(scratch) / "raw", Path(scratch) / "data"
        write_raw(raw, 42)
        options = Options(tuple(TASKS), None, None, False, False, None)
        build(LocalSource(raw, name="demo"), out, options, log=lambda _: None)
        found = {task: load_questions(out, task, "alpaca") for task in TASKS}
    return {
        task: [replace(asked[n % len(asked)], index=n) for n in range(per_task)]
        for task, asked in found.items()
    }


def tokenizer_of(questions: dict[str, list[Question]]) -> Any:
    """A byte-level BPE of 512 pieces, made of the questions: it gives their prompts the lengths of real ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = [
        text for asked in questions.values() for q in asked for text in (q.prompt, ANSWER_PREFIX + q.answer)
    ]
    made = Tokenizer(models.BPE())
    digits, pieces = (
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    )
    made.pre_tokenizer = pre_tokenizers.Sequence([digits, pieces])
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


class ScriptedModel(LanguageModel):
    """Computes all that the model does; then, where there is a script, prefers its next token."""

    script: Tensor | None = None
    """The token that follows each token of the vocabulary."""

    def forward(self, ids: Tensor, *others: Any, **options: Any) -> tuple[Tensor, Any]:
        """As `LanguageModel.forward`."""
        logits, cache = super().forward(ids, *others, **options)
        if self.script is not None:
            following = self.script[ids[:, -logits.shape[1] :]]
            logits = logits.scatter(-1, following[..., None], 1e4)
        return logits, cache


def model_of(conditions: Conditions, tokenizer: Any) -> ScriptedModel:
    """Random weights, drawn on the device: bf16 on a GPU."""
    device = conditions.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model: Any = random_model(
        conditions.shape, dtype, resolve_attention("auto", dtype, device, LLAMA_ATTENTION), device
    )
    for config in (model.config, model.generation_config):
        config.use_cache, config.eos_token_id = True, END
    return ScriptedModel(model, tokenizer)


class Scripted:
    """`generate` of a model that answers as a trained one does."""

    def __init__(self, lm: ScriptedModel, tasks: dict[str, TaskItems]) -> None:
        self._lm, self._tasks = lm, tasks
        self._answerer = Answerer(lm, PROTOCOLS["generate"], tasks)

    def answer(self, batch: Batch) -> None:
        """Answer; an answer that cannot be read is an error."""
        lm = self._lm
        lm.script = script_of(self._tasks[batch.task], lm.config.vocab_size, lm.device)
        try:
            answers = self._answerer.answer(batch)
        finally:
            lm.script = None
        if any(answer.prediction is None for answer in answers):
            raise RuntimeError(f"no answer in {answers[0].output!r}")


def script_of(task: TaskItems, vocabulary: int, device: torch.device) -> Tensor:
    """The first item's first answer and the end token; it starts after any token that is not part of it."""
    answer = [*task.items[0].candidates[0], END]
    following = torch.full((vocabulary,), answer[0])
    following[answer[:-1]] = torch.tensor(answer[1:])
    return following.to(device)


class InTurn:
    """`generate`'s loop for as many tokens as the others compute, none of them drafted, whatever they say."""

    def __init__(self, lm: LanguageModel, tasks: dict[str, TaskItems]) -> None:
        self._lm, self._tasks = lm, tasks
        self._prefixes: dict[str, SharedPrefix] = {}

    def answer(self, batch: Batch) -> None:
        """Compute the tokens."""
        lm = self._lm
        if batch.task not in self._prefixes:
            self._prefixes[batch.task] = SharedPrefix(lm, self._tasks[batch.task].shared_prefix)
        stop_ids, lm.stop_ids = lm.stop_ids, frozenset()
        try:
            prompts = [item.prompt for item in batch.items]
            limits = [NEW_TOKENS] * len(prompts)
            generate_greedy(lm, self._prefixes[batch.task], prompts, limits, lambda _: False)
        finally:
            lm.stop_ids = stop_ids


def batch_seconds(
    lm: LanguageModel, batches: Sequence[Batch], ask: Callable[[Batch], object], go_on: Callable[[], bool]
) -> list[tuple[int, float]]:
    """Items and seconds of every batch that time allows; the first one runs once before, uncounted."""
    ask(batches[0])
    done = []
    for batch in batches:
        if done and not go_on():
            break
        done.append((len(batch.items), seconds_of(lambda b=batch: ask(b), lm.device)))  # type: ignore[misc]
    return done


def reference_seconds(
    lm: LanguageModel, tasks: dict[str, TaskItems], count: int, tokens: int, go_on: Callable[[], bool]
) -> list[float]:
    """Of each item that time allows, of `count` spread over all lengths, in a seeded order; one before, uncounted."""
    items = spread_evenly(tasks, count)
    random.Random(0).shuffle(items)
    contender = reference(lm, tasks, items, {}, ends=False, new_tokens=tokens)
    works = [work for dealt in contender.rounds for work in dealt]
    times: list[float] = []
    for number, work in enumerate(works):
        if not go_on():
            break
        if number == 0:
            work()
            synchronise(lm.device)
        times.append(seconds_of(work, lm.device))
    return times
