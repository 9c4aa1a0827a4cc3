"""The named settings that are compared, and the options that all runs share."""

from __future__ import annotations

LORA = "LoRA"

STARTS: dict[str, dict[str, object]] = {
    LORA: {"method": "lora"},
    "gaussian": {},
    "gradient": {"init": "gradient"},
    "LoRA-GA": {"method": "lora_ga"},
}
"""How a run begins."""

RIVALS: dict[str, dict[str, object]] = {
    "rsLoRA": {"method": "rslora"},
    "DoRA": {"method": "dora"},
    "PiSSA": {"method": "pissa"},
    "OLoRA": {"method": "olora"},
    "AdaLoRA": {"method": "adalora"},
}
"""Others' methods, beside LoRA and LoRA-GA."""

FORMS: dict[str, dict[str, object]] = {
    "lambda-8": {"lambda_lr": 8},
    "lambda-60": {"lambda_lr": 60},
    "eta-0.2": {"orth_weight": 0.2},
    "eta-0.01": {"orth_weight": 0.01},
    "norm": {"orth_form": "norm", "orth_weight": 0.1},
    "squared": {"orth_form": "squared", "orth_weight": 0.1},
    "none": {"orth_weight": 0},
}
"""What each changes in `gaussian` (`lambda_lr: auto`, `orth_form: decoupled`, `orth_weight: 0.05`)."""

GROWING: dict[str, object] = {
    "rank": 4, "alpha": 8, "max_rank": 8, "direction": "expand", "adjust_size": 10_000, "schedule": "constant",
    "adjust_start": 19, "adjust_interval": 1,
}  # fmt: skip
"""From rank 4 to 8 in every matrix, one direction a step after steps 20 to 23, then fixed."""
GROWING_LATE = {**GROWING, "adjust_start": 99}
"""The same after steps 100 to 103: half-way through a run of 200 steps."""
GROWTH: dict[str, dict[str, object]] = {
    "grow": GROWING,
    "grow-orthogonal": {**GROWING, "new_direction": "orthogonal"},
    "grow-gradient": {**GROWING, "new_direction": "gradient"},
    "grow-late": GROWING_LATE,
    "grow-late-gradient": {**GROWING_LATE, "new_direction": "gradient"},
}

ALLOCATING: dict[str, object] = {
    "init": "gradient", "new_direction": "gradient", "adjust_interval": 20, "adjust_size": 8,
}  # fmt: skip
"""Directions from the gradient for all, and the same calendar: only what decides where they go differs."""
ALLOCATION: dict[str, dict[str, object]] = {
    "alloc-entropy": {**ALLOCATING, "importance": "entropy"},
    "alloc-growth": {**ALLOCATING, "importance": "growth"},
    "alloc-sensitivity": {**ALLOCATING, "importance": "sensitivity"},
    "alloc-random": {**ALLOCATING, "importance": "random"},
    "alloc-reversed": {**ALLOCATING, "importance": "reversed"},
    # Without a rank change a gradient for new directions would have no effect.
    "alloc-fixed": {**ALLOCATING, "new_direction": "zero_impact", "adjust_size": 0},
}

GROUPS = {"starts": STARTS, "rivals": RIVALS, "forms": FORMS, "growth": GROWTH, "allocation": ALLOCATION}
"""Settings by a name for all of them."""
SETTINGS: dict[str, dict[str, object]] = {
    name: options for group in GROUPS.values() for name, options in group.items()
}

STEPS = 120
FIXED = {
    "ds": "ds_configs/zero2.json", "rank": 8, "alpha": 16, "lr": 3e-4, "max_steps": STEPS, "warmup_steps": 12,
    "val_size": 64, "val_every": STEPS // 2, "adjust_size": 0, "log_every": 1, "save_every": 50,
    "keep_checkpoints": 1, "init": "gaussian",
}  # fmt: skip
"""The options of all runs, before those of a setting and of the command line."""


def named(words: str) -> list[str]:
    """The settings of a comma-separated list of settings and groups, each once.

    Raises:
        ValueError: there is no such setting or group; its argument is the name.
    """
    found: list[str] = []
    for word in words.split(","):
        if word not in SETTINGS and word not in GROUPS:
            raise ValueError(word)
        found += list(GROUPS[word]) if word in GROUPS else [word]
    return list(dict.fromkeys(found))


def plain_growth(setting: str) -> str:
    """The setting that grows at the same step with Gaussian directions."""
    return "grow-late" if setting.startswith("grow-late") else "grow"
