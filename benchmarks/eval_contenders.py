"""The ways to answer that `eval_speed` compares, each as work in rounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from eval.answering.answerer import Answerer
from eval.answering.batching import Batch, order_batches, plan_batches
from eval.answering.library_generate import generate_with_library
from eval.items import Item, TaskItems
from eval.model.language_model import LanguageModel
from eval.parsing import read_answer
from eval.predictions import Prediction
from eval.protocols import MAX_NEW_TOKENS, PROTOCOLS

ROUNDS = 5
Key = tuple[str, int]
Work = Callable[[], int]


@dataclass
class Contender:
    """One way to answer: its work in rounds, and of each the items, the seconds and the CPU's seconds."""

    name: str
    rounds: list[list[Work]]
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    items: list[int] = field(default_factory=list)

    def run(self, number: int) -> None:
        """Do the work of one round."""
        start, cpu_start = time.perf_counter(), time.process_time()
        done = sum(work() for work in self.rounds[number])
        self.seconds.append(time.perf_counter() - start)
        self.cpu_seconds.append(time.process_time() - cpu_start)
        self.items.append(done)

    @property
    def rate(self) -> float:
        """Items per second over all rounds."""
        return sum(self.items) / sum(self.seconds)

    @property
    def cpu_cost(self) -> float:
        """CPU seconds per item: what a busy machine leaves as it is."""
        return sum(self.cpu_seconds) / sum(self.items)


def in_rounds(work: Sequence[Work]) -> list[list[Work]]:
    """Deal work out to the rounds, so that each sees long and short items alike."""
    return [list(work[number::ROUNDS]) for number in range(ROUNDS)]


def plan(answerer: Answerer, tasks: dict[str, TaskItems]) -> list[Batch]:
    """The batches that the harness would make."""
    budget = answerer.default_tokens()
    return order_batches(
        b for t in tasks.values() for b in plan_batches(t.task, t.items, answerer.cost, budget)
    )


def ours(
    lm: LanguageModel, tasks: dict[str, TaskItems], mode: str, found: dict[Key, Prediction], name: str
) -> Contender:
    """A protocol of the harness, as `python -m eval` runs it."""
    answerer = Answerer(lm, PROTOCOLS[mode], tasks)

    def work(batch: Batch) -> int:
        found.update({(p.task, p.index): p for p in answerer.answer(batch)})
        return len(batch.items)

    return Contender(name, in_rounds([lambda b=b: work(b) for b in plan(answerer, tasks)]))  # type: ignore[misc]


def reference(
    lm: LanguageModel,
    tasks: dict[str, TaskItems],
    items: Sequence[Item],
    found: dict[Key, str | None],
    *,
    ends: bool,
    new_tokens: int = MAX_NEW_TOKENS,
) -> Contender:
    """The reference's loop: one item, beam search of width 4, 32 new tokens, no mask, padding id 0, scores kept.

    It passes no end token. transformers of its time then ran to 32 tokens; that of today takes the model's own
    and stops when four beams have ended. `ends` chooses; the second is the faster one.
    """
    from transformers import GenerationConfig

    config = GenerationConfig(num_beams=4, pad_token_id=0, do_sample=False)
    config.eos_token_id = sorted(lm.stop_ids) if ends else [-1]  # no vocabulary holds −1

    @torch.no_grad()
    def work(item: Item) -> int:
        out = lm.model.generate(
            input_ids=torch.tensor([item.prompt], device=lm.device),
            generation_config=config,
            return_dict_in_generate=True,
            output_scores=True,
            max_new_tokens=new_tokens,
        )
        question = item.question
        text = lm.decode(out.sequences[0].tolist())
        found[question.task, question.index] = read_answer(tasks[question.task].pattern, text)
        return 1

    name = "reference" if ends else "reference, no end token"
    return Contender(name, in_rounds([lambda i=i: work(i) for i in items]))  # type: ignore[misc]


def greedy(
    lm: LanguageModel, tasks: dict[str, TaskItems], items: Sequence[Item], found: dict[Key, str | None]
) -> Contender:
    """transformers' greedy loop, one item at a time to its end token, the published parsing of the whole text."""

    def work(item: Item) -> int:
        (row,) = generate_with_library(lm, [item.prompt], beams=1, max_new_tokens=MAX_NEW_TOKENS)
        assert row is not None, "the model's numbers are not finite"
        question = item.question
        found[question.task, question.index] = read_answer(tasks[question.task].pattern, lm.decode(row))
        return 1

    return Contender("greedy, batch 1", in_rounds([lambda i=i: work(i) for i in items]))  # type: ignore[misc]


def forward(lm: LanguageModel, tasks: dict[str, TaskItems]) -> Contender:
    """Bare forward passes over the tokens that `score` must compute: no padding, mask or cache.

    These are each task's shared prefix once, and of each item the rest of its prompt and the answers' common
    start; in batches of the harness's size.
    """
    answerer = Answerer(lm, PROTOCOLS["score"], tasks)

    @torch.inference_mode()
    def compute(rows: int, tokens: int) -> int:
        ids = torch.ones(rows, tokens, dtype=torch.long, device=lm.device)
        lm.model(input_ids=ids, logits_to_keep=1, use_cache=False)
        if lm.device.type == "cuda":
            torch.cuda.synchronize()
        return rows

    def shape(batch: Batch) -> tuple[int, int]:
        shared, rows = len(tasks[batch.task].shared_prefix), len(batch.items)
        tokens = sum(len(i.prompt) - shared + i.longest_candidate - 1 for i in batch.items)
        return rows, round(tokens / rows)

    shapes = [shape(batch) for batch in plan(answerer, tasks)]
    work: list[Work] = [lambda s=s: compute(*s) for s in shapes]  # type: ignore[misc]
    work += [lambda t=t: compute(1, len(t.shared_prefix)) - 1 for t in tasks.values() if t.shared_prefix]  # type: ignore[misc]
    return Contender("forward", in_rounds(work))
