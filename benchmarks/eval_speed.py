"""How fast the evaluation is, beside a stand-in of the reference's loop, in one run, interleaved.

    python -m benchmarks.eval_speed --model MODEL --adapter ADAPTER [--data data] [--tasks all|LIST]
                                    [--limit 100] [--reference_items 40]

The reference (LLM-Adapters' commonsense_evaluate.py): batch 1, beam search of width 4, up to 32 new tokens, with
a key-value cache and the end token as its only stop. Our modes answer all items; the reference a sample spread
evenly over the same items, because it takes so long. `forward` is the floor of `score`: the same model run over
as many tokens as must be computed (each prompt behind its task's common beginning, and the answers' common
start), in batches without any padding, mask or cache. Give an adapter that answers: an untuned model generates
to the limit.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from eval.asking import Asker
from eval.batching import Batch, order_batches, plan_batches
from eval.items import Item, TaskItems, load_questions, tokenise
from eval.language_model import LanguageModel
from eval.library_generate import generate_with_library
from eval.loading import load, resolve_prompt
from eval.options import parse_options
from eval.parsing import read_answer
from eval.predictions import Prediction
from eval.protocols import MAX_NEW_TOKENS, PROTOCOLS

ROUNDS = 5
Key = tuple[str, int]


@dataclass
class Contender:
    """One way to answer: its work in rounds, and of each the items, the seconds and the CPU's seconds."""

    name: str
    rounds: list[list[Callable[[], int]]]
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


def in_rounds(work: Sequence[Callable[[], int]]) -> list[list[Callable[[], int]]]:
    """Deal work out to the rounds, so that each sees long and short items alike."""
    return [list(work[number::ROUNDS]) for number in range(ROUNDS)]


def ours(
    lm: LanguageModel, tasks: dict[str, TaskItems], mode: str, found: dict[Key, Prediction]
) -> Contender:
    """A protocol of the harness, as `python -m eval` runs it."""
    asker = Asker(lm, PROTOCOLS[mode], tasks)
    batches = plan(asker, tasks)

    def work(batch: Batch) -> int:
        found.update({(p.task, p.index): p for p in asker.ask(batch)})
        return len(batch.items)

    return Contender(mode, in_rounds([lambda batch=batch: work(batch) for batch in batches]))  # type: ignore[misc]


def plan(asker: Asker, tasks: dict[str, TaskItems]) -> list[Batch]:
    """The batches that the harness would make."""
    budget = asker.default_tokens()
    return order_batches(b for t in tasks.values() for b in plan_batches(t.task, t.items, asker.cost, budget))


def reference(
    lm: LanguageModel, tasks: dict[str, TaskItems], items: list[Item], found: dict[Key, str | None]
) -> Contender:
    """The stand-in: one item at a time, beam 4."""

    def work(item: Item) -> int:
        (row,) = generate_with_library(lm, [item.prompt], beams=4, max_new_tokens=MAX_NEW_TOKENS)
        question = item.question
        found[question.task, question.index] = read_answer(tasks[question.task].pattern, lm.decode(row))
        return 1

    return Contender("reference", in_rounds([lambda item=item: work(item) for item in items]))  # type: ignore[misc]


def forward(lm: LanguageModel, tasks: dict[str, TaskItems]) -> Contender:
    """Bare forward passes over the tokens that `score` must compute, none of them padding."""
    asker = Asker(lm, PROTOCOLS["score"], tasks)

    @torch.inference_mode()
    def work(batch: Batch) -> int:
        task = tasks[batch.task]
        tokens = sum(len(i.prompt) - len(task.shared) + i.longest_candidate - 1 for i in batch.items)
        rows = len(batch.items)
        lm.model(
            input_ids=torch.ones(rows, round(tokens / rows), dtype=torch.long, device=lm.device),
            logits_to_keep=1,
            use_cache=False,
        )
        if lm.device.type == "cuda":
            torch.cuda.synchronize()
        return rows

    return Contender("forward", in_rounds([lambda b=b: work(b) for b in plan(asker, tasks)]))  # type: ignore[misc]


def spread_evenly(tasks: dict[str, TaskItems], count: int) -> list[Item]:
    """`count` items at even distances in the list of all, ordered by length."""
    everything = sorted((i for t in tasks.values() for i in t.items), key=lambda item: len(item.prompt))
    count = min(count, len(everything))
    return [everything[(2 * n + 1) * len(everything) // (2 * count)] for n in range(count)]


def agreement(first: dict[Key, str | None], second: dict[Key, Prediction]) -> str:
    """Of the items that either answered."""
    pairs = [(a, second[key].prediction) for key, a in first.items() if a or second[key].prediction]
    return f"{sum(a == b for a, b in pairs)}/{len(pairs)}" if pairs else "none answered"


def main() -> None:
    """Print the rates, their ratios to the reference and to the floor, and the agreement."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reference_items", type=int, default=40)
    known, rest = parser.parse_known_args()
    options = parse_options(rest)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lm = load(options, device)
    style, _ = resolve_prompt(options.prompt, options.adapter)
    tasks = {
        task: tokenise(task, load_questions(options.data, task, style, options.limit), lm.tokenizer)
        for task in options.tasks
        if (options.data / task / "test.json").is_file()
    }
    references: dict[Key, str | None] = {}
    generated: dict[Key, Prediction] = {}
    scored: dict[Key, Prediction] = {}
    contenders = [
        reference(lm, tasks, spread_evenly(tasks, known.reference_items), references),
        ours(lm, tasks, "generate", generated),
        ours(lm, tasks, "score", scored),
        forward(lm, tasks),
    ]
    for number in range(ROUNDS):
        for contender in contenders:
            contender.run(number)
    base = contenders[0]
    print(f"{Path(options.model).name}, {lm.model.dtype}, {device}, {torch.get_num_threads()} threads")
    for contender in contenders:
        ratios = [
            (i / s) / (bi / bs)
            for i, s, bi, bs in zip(contender.items, contender.seconds, base.items, base.seconds, strict=True)
        ]
        done, seconds = sum(contender.items), sum(contender.seconds)
        print(
            f"{contender.name:10} {done:6,} items {seconds:8.1f} s {contender.rate:8.2f} items/s "
            f"{contender.rate / base.rate:6.1f} x (median round {statistics.median(ratios):.1f}), "
            f"CPU {contender.cpu_cost:.3f} s/item, {base.cpu_cost / contender.cpu_cost:.1f} x"
        )
    of_floor = contenders[3].cpu_cost / contenders[2].cpu_cost
    print(f"score / forward: {contenders[2].rate / contenders[3].rate:.2f}, by CPU time {of_floor:.2f}")
    print("same answer as the reference, of the items that either answered:")
    print(f"  generate {agreement(references, generated)}, score {agreement(references, scored)}")
    for name, answers in (
        ("reference", list(references.values())),
        ("generate", [p.prediction for p in generated.values()]),
    ):
        print(f"unanswered by {name}: {answers.count(None)} of {len(answers)}")


if __name__ == "__main__":
    main()
