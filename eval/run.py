"""An evaluation, top to bottom: items, model, batches shared among the processes, results."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from data_prep.errors import DataError
from data_prep.prompt import CHAT
from eval.answering.backends import Answering, Backend, open_backend
from eval.answering.batching import Batch, order_batches, plan_batches
from eval.files import write_json, write_text
from eval.fingerprint import fingerprint_files, fingerprint_task
from eval.items import Question, TaskItems, load_questions, tokenise
from eval.model.loading import resolve_prompt
from eval.options import Options
from eval.predictions import PredictionFolder, unanswered
from eval.progress import Progress
from eval.protocols import MAX_NEW_TOKENS, PROTOCOLS
from eval.results import count, summarise, table
from eval.workers import Team
from flexlora_ds.errors import UserError

_BATCHES_PER_PROCESS = 4  # at least, so that processes finish close together


def evaluate(options: Options, team: Team) -> dict[str, Any] | None:
    """Run an evaluation on this process of a team; the summary on the leading process, None on the others.

    Raises UserError, DataError or RunError as the design's table of exit codes says.
    """
    threads = team.set_threads()
    quiet_libraries()
    style, warning = resolve_prompt(options.prompt, options.adapter)
    questions = _load_all_questions(options, style)
    if all(question.chat for found in questions.values() for question in found):
        style = CHAT
    _require_one_process(options, team)
    backend = open_backend(options, team.device())
    tasks = {task: tokenise(task, found, backend.tokenizer) for task, found in questions.items()}
    asker = backend.asker(PROTOCOLS[options.mode], tasks)
    settings = _settings(options, style, backend, tasks)
    folder = PredictionFolder(options.out)
    if team.leads:
        _note(warning and f"warning: {warning}")
        folder.lock()
        folder.claim(settings)
        folder.fold(tasks.values())
        _settle_too_long(asker, backend.context, tasks, folder)
    team.connect()
    budget = int(team.agree("batch tokens", str(options.batch_tokens or asker.default_tokens())))
    team.started = True
    batches = _plan(asker, tasks, folder, budget, backend.most_rows or options.batch_size, team)
    seconds = _work(asker, batches, folder, team)
    if not team.leads:
        return None
    folder.fold(tasks.values())
    settings |= {
        "batch_size": options.batch_size or "auto",
        "batch_tokens": budget,
        "processes": team.size,
        "threads": threads,
        "device": backend.device,
    }
    return _report(options, tasks, folder, settings, seconds)


def _load_all_questions(options: Options, style: str) -> dict[str, list[Question]]:
    missing = [task for task in options.tasks if not (options.data / task / "test.json").is_file()]
    if missing:
        there = [task for task in options.tasks if task not in missing]
        mend = f"build it with python -m data_prep --out {options.data}"
        if there:
            mend += f", or choose --tasks {','.join(there)}"
        raise DataError(f"no test.json for {', '.join(missing)}", f"--data {options.data}", mend)
    return {task: load_questions(options.data, task, style, options.limit) for task in options.tasks}


def _require_one_process(options: Options, team: Team) -> None:
    if options.backend == "vllm" and team.size > 1:
        raise UserError(
            "--backend vllm runs as one process, and takes the GPUs it needs itself; start it without a launcher"
        )


def _settings(options: Options, style: str, backend: Backend, tasks: dict[str, TaskItems]) -> dict[str, Any]:
    """Everything that can change a prediction; results under one `--out` share it."""
    found = dict(backend.settings)
    revision = found.pop("revision", None)
    return {
        "model": options.model,
        "model_files": fingerprint_files(options.model) or revision,
        "adapter": options.adapter,
        "adapter_files": fingerprint_files(options.adapter) if options.adapter else None,
        "merge": options.merge,
        "protocol": PROTOCOLS[options.mode].label,
        "prompt": style,
        "max_new_tokens": MAX_NEW_TOKENS,
        **found,
        "limit": options.limit,
        "data": {name: fingerprint_task(task) for name, task in tasks.items()},
    }


def _settle_too_long(
    asker: Answering, context: int | None, tasks: dict[str, TaskItems], folder: PredictionFolder
) -> None:
    """Items that the model's context cannot hold are unanswered, and said to be."""
    too_long = [item for task in tasks.values() for item in task.items if not asker.fits(item)]
    if not too_long:
        return
    notes = [
        f"{len(item.prompt)} + {item.longest_candidate} tokens in a context of {context}" for item in too_long
    ]
    journal = folder.journal(0)
    journal.add([unanswered(item.question, note) for item, note in zip(too_long, notes, strict=True)])
    journal.close()
    folder.fold(tasks.values())
    first = too_long[0].question
    _note(
        f"warning: {len(too_long)} items do not fit the model's context of {context} tokens and count as unanswered "
        f"(the first: {first.task}, item {first.index})"
    )


def _plan(
    asker: Answering,
    tasks: dict[str, TaskItems],
    folder: PredictionFolder,
    budget: int,
    max_rows: int | None,
    team: Team,
) -> list[Batch]:
    """The batches still to do, the same list on every process: nothing is written while any process plans."""
    left, kept = {}, 0
    for name, task in tasks.items():
        done = folder.read(name)
        left[name] = [item for item in task.items if item.question.index not in done]
        kept += len(done)
    if kept and team.leads:
        _note(f"continuing: {kept:,} of {kept + sum(map(len, left.values())):,} items are there already")
    if team.size > 1:
        everything = sum(asker.cost(item) for items in left.values() for item in items)
        budget = max(1, min(budget, everything // (_BATCHES_PER_PROCESS * team.size)))
        team.meet("planned")
    return order_batches(
        batch
        for name, items in left.items()
        for batch in plan_batches(name, items, asker.cost, budget, max_rows)
    )


def _work(asker: Answering, batches: Sequence[Batch], folder: PredictionFolder, team: Team) -> float:
    """Answer batches until none is left; the seconds it took."""
    progress = Progress(sum(len(batch.items) for batch in batches))
    journal = folder.journal(team.rank)
    for number in team.shared_numbers(len(batches)):
        journal.add(asker.ask(batches[number]))
        done = team.add_done(len(batches[number].items))
        if team.leads:
            progress.show(done)
    journal.close()
    team.finish()
    return progress.seconds


def _report(
    options: Options,
    tasks: dict[str, TaskItems],
    folder: PredictionFolder,
    settings: dict[str, Any],
    seconds: float,
) -> dict[str, Any]:
    protocol = PROTOCOLS[options.mode]
    results = [count(task, list(folder.read(name).values())) for name, task in tasks.items()]
    summary = summarise(results, protocol, settings, seconds)
    text = table(summary, protocol)
    write_text(options.out / "table.md", text)
    write_json(options.out / "results.json", summary)
    print(f"{text}\n{options.out}/results.json")
    return summary


def _note(text: str | None) -> None:
    if text:
        print(text, file=sys.stderr)


def quiet_libraries() -> None:
    """Their progress bars and hints would bury ours."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("torch").setLevel(logging.ERROR)
