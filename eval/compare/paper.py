"""What the FlexLoRA paper reports for commonsense on LLaMA3-8B (Table 2, in %): cited, not measured here.

The source lost the names of the adapter rows: they are inferred from its prose and the parameter counts, by
which its dynamic rows of 'rank 8' train 21.2M parameters, LoRA's 14.2M. ARC-e and ARC-c look exchanged.
"""

from __future__ import annotations

from data_prep.tasks import TASKS

_ROWS = (
    ("full fine-tuning", "8B", (75.3, 89.9, 81.5, 95.8, 87.6, 91.6, 79.3, 87.4, 86.1)),
    ("LoRA r=8", "14.2M", (62.2, 86.5, 80.3, 94.5, 84.4, 77.7, 88.0, 85.8, 82.4)),
    ("AdaLoRA r=8", "21.2M", (74.1, 88.4, 80.3, 95.7, 84.4, 80.1, 91.0, 87.0, 85.1)),
    ("FlexLoRA r=8", "21.2M", (74.3, 88.6, 81.0, 95.6, 84.9, 80.2, 90.7, 86.4, 85.2)),
    ("FlexLoRA r=32", "56.6M", (72.8, 89.1, 80.7, 96.0, 86.4, 81.3, 90.8, 87.2, 85.5)),
)
_COLUMNS = (
    "boolq",
    "piqa",
    "social_i_qa",
    "hellaswag",
    "winogrande",
    "ARC-Easy",
    "ARC-Challenge",
    "openbookqa",
)

PAPER = tuple(
    (name, parameters, dict(zip((*_COLUMNS, "average"), values, strict=True)))
    for name, parameters, values in _ROWS
)
"""(method, trainable parameters, {task: accuracy in %, "average": …}) per row."""

assert set(_COLUMNS) <= set(TASKS)
