"""The options of the method: typed, validated when built, with an exact round trip through JSON."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from flexlora_ds.errors import UserError

Importance = Literal[
    "entropy",
    "nuclear",
    "frobenius",
    "sensitivity",
    "elem_energy_entropy",
    "matrix_energy_entropy",
    "random",
    "reversed",
]
Direction = Literal["both", "prune", "expand"]
NewDirection = Literal["zero_impact", "small", "zero", "orthogonal"]
NewMoment = Literal["own_age", "zero", "survivor_mean"]
Schedule = Literal["cubic", "cubic_fast", "linear", "exponential", "constant"]
Budget = Literal["ranks", "params"]
RankOne = Literal["neutral", "lowest", "expand"]
Spectrum = Literal["lambda", "exact"]
OrthForm = Literal["decoupled", "norm", "squared"]
Auto = Literal["auto"]

ALL_LINEAR = "all-linear"

CHOICES: dict[str, tuple[str, ...]] = {
    "importance": get_args(Importance),
    "direction": get_args(Direction),
    "new_direction": get_args(NewDirection),
    "new_moment": get_args(NewMoment),
    "schedule": get_args(Schedule),
    "budget": get_args(Budget),
    "rank_one": get_args(RankOne),
    "spectrum": get_args(Spectrum),
    "orth_form": get_args(OrthForm),
}
"""The allowed words of every option that is a choice, for help texts and error messages."""


@dataclass(frozen=True)
class FlexLoRAConfig:
    """What is adapted, how ranks change, and how the adapter is kept orthogonal.

    Raises:
        UserError: a value has the wrong type, is out of range, or contradicts another option.
    """

    rank: int = 8
    """Rank of every matrix at the start; it also fixes the scale `alpha / rank` of the whole run."""
    alpha: float = 16.0
    """Numerator of the scale."""
    dropout: float = 0.05
    """Probability of dropping an element of the adapter's input."""
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
    """Module name suffixes (an entry that no name ends in is a regular expression for whole names), or
    `all-linear`."""

    importance: Importance = "entropy"
    """How a matrix is scored: high scores gain directions, low scores lose them."""
    direction: Direction = "both"
    """Whether a change prunes, expands, or does both."""
    new_direction: NewDirection = "zero_impact"
    """How a new direction begins."""
    new_direction_std: float | None = None
    """Standard deviation of a new direction's P and Q; None follows `init_std`."""
    new_moment: NewMoment = "own_age"
    """The optimizer state a new direction begins with."""
    schedule: Schedule = "cubic"
    """How the size of a change falls from `adjust_size` over the calendar."""
    adjust_size: int = 4
    """The most directions that one change may move; 0 = ranks never change."""
    adjust_start: int | Auto = "auto"
    """Steps before the calendar begins; auto = 15.66 % of the run."""
    adjust_freeze: int | Auto = "auto"
    """Steps at the end without a change; auto = 15.66 % of the run."""
    adjust_interval: int | Auto = "auto"
    """Steps between changes; auto = 3.13 % of the run."""
    budget: Budget = "ranks"
    """What a change conserves: the sum of the ranks, or (as an upper limit) the number of parameters."""
    grace: int = 0
    """Changes for which a new direction neither counts in the entropy nor is pruned."""
    rank_one: RankOne = "neutral"
    """How a matrix of rank 1, whose entropy is undefined, is scored."""
    min_rank: int = 1
    """No matrix is pruned below this rank."""
    max_rank: int | None = None
    """No matrix grows above this rank (nor above its own shape); None = 4 · rank."""
    spectrum: Spectrum = "lambda"
    """Scores are read from λ, or from the true singular values of P diag(λ) Q."""
    expand_min_energy: float = 0.0
    """Matrices whose Σλ² lies below this quantile of all matrices are not expanded."""

    orth_form: OrthForm = "decoupled"
    """How P's columns and Q's rows are kept orthonormal."""
    orth_weight: float | None = None
    """Strength of that; None = 0.05 for decoupled, 0.1 for the two that add to the loss."""
    init_std: Literal["unit"] | float = "unit"
    """Standard deviation of P and Q at the start; unit = directions of expected norm 1."""
    lambda_lr: Auto | float = "auto"
    """Learning rate of λ as a multiple of the run's; auto = √min(in, out) of its layer."""
    weight_decay: float = 0.0
    """Decoupled weight decay of λ (P and Q have none)."""
    seed: int = 42
    """Seed of everything the method draws."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "target_modules", _checked_targets(self.target_modules))
        for name, choices in CHOICES.items():
            _check_choice(name, getattr(self, name), choices)
        for name, bounds in _RANGES.items():
            object.__setattr__(self, name, bounds.checked(name, getattr(self, name)))
        self._check_together()

    def _check_together(self) -> None:
        if self.min_rank > self.rank:
            raise UserError(f"min_rank {self.min_rank} is above rank {self.rank} (key min_rank); lower it")
        if self.max_rank is not None and self.max_rank < self.rank:
            raise UserError(f"max_rank {self.max_rank} is below rank {self.rank} (key max_rank); raise it")
        if self.orth_form == "decoupled" and self.orth_strength > 0.5:
            raise UserError(
                f"orth_weight {self.orth_weight} overshoots with orth_form decoupled (key orth_weight); "
                "give at most 0.5"
            )

    @property
    def scaling(self) -> float:
        """The scale s of ΔW = s · P diag(λ) Q, constant for the whole run."""
        return self.alpha / self.rank

    @property
    def orth_strength(self) -> float:
        """`orth_weight`, with its default filled in."""
        if self.orth_weight is not None:
            return self.orth_weight
        return 0.05 if self.orth_form == "decoupled" else 0.1

    def rank_limit(self, out_features: int, in_features: int) -> int:
        """The largest rank a layer of this shape may reach."""
        largest = 4 * self.rank if self.max_rank is None else self.max_rank
        return min(largest, out_features, in_features)

    def to_dict(self) -> dict[str, Any]:
        """All options as JSON values; `from_dict` gives an equal config back."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return values | {"target_modules": list(self.target_modules)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FlexLoRAConfig:
        """Build from a mapping; keys left out take their defaults.

        Raises:
            UserError: an unknown key (the nearest known one is named), or a value as in the constructor.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise UserError(f"unknown option {key!r} (key {key}); {_nearest(str(key), known)}")
        return cls(**values)

    def to_json(self) -> str:
        """All options as indented JSON text."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> FlexLoRAConfig:
        """Build from JSON text.

        Raises:
            UserError: the text is not a JSON object, or as in `from_dict`.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(
                f"not valid JSON: {error.msg} (line {error.lineno}, column {error.colno}); correct it"
            ) from error
        if not isinstance(values, dict):
            raise UserError(f"options are a JSON {type(values).__name__} (top level); give an object")
        return cls.from_dict(values)


_HUGE = 1e300  # nothing beyond is a sensible number, and whole numbers beyond do not fit a float


@dataclass(frozen=True)
class _Range:
    """The values a numeric option may take: an interval, open or closed, perhaps a word or None beside it."""

    kind: type[int] | type[float]
    low: float
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False
    word: str | None = None
    none: bool = False

    def checked(self, name: str, value: object) -> int | float | str | None:
        """The value, whole numbers made float where a float is meant."""
        if (value is None and self.none) or (self.word is not None and value == self.word):
            assert value is None or isinstance(value, str)
            return value
        meant = int if self.kind is int else (int, float)
        if isinstance(value, bool) or not isinstance(value, meant):
            raise UserError(f"{name} is {value!r} (key {name}); give {self}")
        assert isinstance(value, (int, float))
        if self.kind is float:
            value = float(value) if abs(value) < _HUGE else math.nan
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        if not (above and below):
            raise UserError(f"{name} {value!r} is out of range (key {name}); give {self}")
        return value

    def __str__(self) -> str:
        what = "a whole number" if self.kind is int else "a number"
        text = f"{what} {'above' if self.low_open else 'of at least'} {self.low:g}"
        if self.high < math.inf:
            text += f" and {'below' if self.high_open else 'at most'} {self.high:g}"
        text += f", or {self.word!r}" if self.word else ""
        return text + (", or none" if self.none else "")


_RANGES: dict[str, _Range] = {
    "rank": _Range(int, 1),
    "alpha": _Range(float, 0, low_open=True),
    "dropout": _Range(float, 0, 1, high_open=True),
    "new_direction_std": _Range(float, 0, low_open=True, none=True),
    "adjust_size": _Range(int, 0),
    "adjust_start": _Range(int, 0, word="auto"),
    "adjust_freeze": _Range(int, 0, word="auto"),
    "adjust_interval": _Range(int, 1, word="auto"),
    "grace": _Range(int, 0),
    "min_rank": _Range(int, 1),
    "max_rank": _Range(int, 1, none=True),
    "expand_min_energy": _Range(float, 0, 1),
    "orth_weight": _Range(float, 0, none=True),
    "init_std": _Range(float, 0, low_open=True, word="unit"),
    "lambda_lr": _Range(float, 0, low_open=True, word="auto"),
    "weight_decay": _Range(float, 0),
    "seed": _Range(int, 0, 2**63, high_open=True),
}


def _nearest(word: str, known: Iterable[str]) -> str:
    """The mend of a misspelt word: the nearest known one, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        hint = _nearest(str(value), choices)
        listed = "" if hint.startswith("known") else f" (one of {', '.join(choices)})"
        raise UserError(f"{name} {value!r} is unknown (key {name}); {hint}{listed}")


def _checked_targets(value: object) -> tuple[str, ...]:
    """`target_modules` as a tuple without repetitions; a single string is one entry."""
    entries = [value] if isinstance(value, str) else value
    if not isinstance(entries, (list, tuple)) or not entries:
        raise UserError(f"target_modules is {value!r} (key target_modules); give a list of module names")
    for entry in entries:
        if not isinstance(entry, str) or not entry:
            raise UserError(f"target_modules holds {entry!r} (key target_modules); give module names")
        try:
            re.compile(entry)
        except re.error as error:
            raise UserError(
                f"target_modules entry {entry!r} is neither a name nor a regular expression: {error} "
                "(key target_modules); correct it"
            ) from error
    if ALL_LINEAR in entries and len(entries) > 1:
        raise UserError(f"{ALL_LINEAR} stands beside other entries (key target_modules); give it alone")
    return tuple(dict.fromkeys(entries))
