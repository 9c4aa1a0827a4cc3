"""Reading the answer from a generated text, as LLM-Adapters' commonsense_evaluate.py does."""

from __future__ import annotations

import re

RESPONSE_MARK = "### Response:"


def read_answer(pattern: str | re.Pattern[str], output: str) -> str | None:
    """The first match of the task's pattern after the last `### Response:`; None where there is none: unanswered.

    Case counts, parts of words count (`untrue` is `true`), and a match need not be one of the item's own
    answers (`answer5` where there are three). `output` is the generated text alone or with its prompt.
    """
    match = re.search(pattern, output.rpartition(RESPONSE_MARK)[2].strip())
    return match.group(0) if match else None
