"""An evaluation from top to bottom: items, model, batches shared among the processes, results."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from data_prep.chat import prompt_note
from data_prep.chat_template import ChatTemplate, asks_for_day, today
from data_prep.prompt import CHAT
from eval.answering.backends import Answering, Backend, open_backend
from eval.answering.batching import Batch, order_batches, plan_batches
from eval.fingerprint import fingerprint_files, fingerprint_task
from eval.items import TaskItems, require_known_tokens
from eval.model.loading import recorded_date, resolve_prompt
from eval.options import Options
from eval.predictions import TEMPLATE_DATE, PredictionFolder, unanswered
from eval.protocols import MAX_NEW_TOKENS, Protocol
from eval.results import count, summarise, table
from eval.test_sets import load_all_questions, protocol_for, tokenise_all
from eval.workers import Team
from flexlora_ds.errors import UserError
from flexlora_ds.files.text import write_json_atomically, write_text_atomically
from flexlora_ds.terminal.counted import counted
from flexlora_ds.terminal.progress_bar import ProgressBar

_BATCHES_PER_PROCESS = 4  # at least, so that processes finish close together


def evaluate(options: Options, team: Team) -> dict[str, Any] | None:
    """Run an evaluation on this process of a team; the summary on rank 0, None on the others.

    Raises UserError or RunError for what `flexlora_ds.terminal.command` gives the exit codes 2 and 1.
    """
    threads = team.set_threads()
    quiet_libraries()
    style, warning = resolve_prompt(options.prompt, options.adapter or options.model)
    note = _print_note if team.is_rank_zero else lambda line: None
    questions = load_all_questions(options.data, options.tasks, options.limit, style, note)
    protocol, style = protocol_for(options.mode, questions, style)
    _require_one_process(options, team)
    backend = open_backend(options, team.device())
    if team.is_rank_zero:
        _print_note(backend.effect)
        for doubt in backend.doubts:
            _print_note(f"warning: {doubt}")
    team.connect()
    day = _template_date(options, style, backend.tokenizer, team)
    tasks = tokenise_all(questions, backend.tokenizer, day)
    if backend.vocabulary is not None:
        require_known_tokens(tasks.values(), backend.tokenizer, backend.vocabulary)
    answerer = backend.answerer(protocol, tasks)
    settings = _settings(options, protocol, style, backend, tasks, day)
    folder = PredictionFolder(options.out)
    if team.is_rank_zero:
        _print_note(warning and f"warning: {warning}")
        if style == CHAT:
            _print_note(prompt_note(ChatTemplate(backend.tokenizer, day)))
        folder.lock()
        folder.check_settings(settings)
        folder.merge_logs(tasks.values())
        _record_too_long(answerer, backend.context, tasks, folder)
    budget = int(team.broadcast("batch tokens", str(options.batch_tokens or answerer.default_tokens())))
    team.started = True
    batches = _plan(answerer, tasks, folder, budget, backend.most_rows or options.batch_size, team)
    seconds = _answer_all(answerer, batches, folder, team)
    if not team.is_rank_zero:
        return None
    folder.merge_logs(tasks.values())
    settings |= {
        "batch_size": options.batch_size or "auto",
        "batch_tokens": budget,
        "processes": team.size,
        "threads": threads,
        "device": backend.device,
    }
    return _report(options, protocol, tasks, folder, settings, seconds)


def _template_date(options: Options, style: str, tokenizer: Any, team: Team) -> str | None:
    """The date that the chat template is given, on all processes; None where it asks for none.

    It is that of the adapter's training, else of the evaluation that `--out` holds, else today.
    """
    if style != CHAT or not asks_for_day(tokenizer):
        return None
    known = recorded_date(options.adapter or options.model) or PredictionFolder(options.out).template_date()
    return team.broadcast("template date", known or today())


def _require_one_process(options: Options, team: Team) -> None:
    if options.backend == "vllm" and team.size > 1:
        raise UserError(
            "--backend vllm runs as one process, and takes the GPUs it needs itself",
            mend="start it without a launcher",
        )


def _settings(
    options: Options,
    protocol: Protocol,
    style: str,
    backend: Backend,
    tasks: dict[str, TaskItems],
    day: str | None,
) -> dict[str, Any]:
    """Everything that can change a prediction; results under one `--out` share it."""
    found = dict(backend.settings)
    revision = found.pop("revision", None)
    return {
        "model": options.model,
        "model_files": fingerprint_files(options.model) or revision,
        "adapter": options.adapter,
        "adapter_files": fingerprint_files(options.adapter) if options.adapter else None,
        "merge": options.merge,
        "protocol": protocol.label,
        "prompt": style,
        **({TEMPLATE_DATE: day} if day else {}),
        "max_new_tokens": MAX_NEW_TOKENS,
        **found,
        "limit": options.limit,
        "data": {name: fingerprint_task(task) for name, task in tasks.items()},
    }


def _record_too_long(
    answerer: Answering, context: int | None, tasks: dict[str, TaskItems], folder: PredictionFolder
) -> None:
    """Record items that do not fit the model's context as unanswered, with a warning."""
    too_long = [item for task in tasks.values() for item in task.items if not answerer.fits(item)]
    if not too_long:
        return
    notes = [
        f"{len(item.prompt)} + {item.longest_candidate} tokens in a context of {context}" for item in too_long
    ]
    log = folder.prediction_log(0)
    log.add([unanswered(item.question, note) for item, note in zip(too_long, notes, strict=True)])
    log.close()
    folder.merge_logs(tasks.values())
    first = too_long[0].question
    _print_note(
        f"warning: {counted(len(too_long), 'item')} longer than the model's context of {context} tokens: unanswered "
        f"(the first: {first.task}, item {first.index})"
    )


def _plan(
    answerer: Answering,
    tasks: dict[str, TaskItems],
    folder: PredictionFolder,
    budget: int,
    max_rows: int | None,
    team: Team,
) -> list[Batch]:
    """The batches that remain, the same list on every process: nothing is written while any process plans."""
    left, finished = {}, 0
    for name, task in tasks.items():
        done = folder.read(name)
        left[name] = [item for item in task.items if item.question.index not in done]
        finished += sum(
            prediction.note is None for prediction in done.values()
        )  # the others were never asked
    if finished and team.is_rank_zero:
        _print_note(
            f"continuing: {finished:,} of {finished + sum(map(len, left.values())):,} items are finished"
        )
    if team.size > 1:
        total = sum(answerer.cost(item) for items in left.values() for item in items)
        budget = max(1, min(budget, total // (_BATCHES_PER_PROCESS * team.size)))
        team.barrier("planned")
    return order_batches(
        batch
        for name, items in left.items()
        for batch in plan_batches(name, items, answerer.cost, budget, max_rows)
    )


def _answer_all(answerer: Answering, batches: Sequence[Batch], folder: PredictionFolder, team: Team) -> float:
    """Answer batches until none is left; the duration in seconds."""
    started = time.monotonic()
    items = sum(len(batch.items) for batch in batches)
    log = folder.prediction_log(team.rank)
    with ProgressBar("evaluating", items, "items", shows=team.is_rank_zero) as bar:
        for number in team.claim_batches(len(batches)):
            log.add(answerer.answer(batches[number]))
            bar.show(team.add_done(len(batches[number].items)))
    log.close()
    team.finish()
    return time.monotonic() - started


def _report(
    options: Options,
    protocol: Protocol,
    tasks: dict[str, TaskItems],
    folder: PredictionFolder,
    settings: dict[str, Any],
    seconds: float,
) -> dict[str, Any]:
    results = [count(task, list(folder.read(name).values())) for name, task in tasks.items()]
    summary = summarise(results, protocol, settings, seconds)
    text = table(summary, protocol)
    write_text_atomically(options.out / "table.md", text)
    write_json_atomically(options.out / "results.json", summary)
    print(f"{text}\n{options.out}/results.json")
    return summary


def _print_note(text: str | None) -> None:
    if text:
        print(text, file=sys.stderr)


def quiet_libraries() -> None:
    """Turn off other libraries' progress bars and hints."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("torch").setLevel(logging.ERROR)
