"""The options of the method: typed, validated when built, with an exact round trip through JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from flexlora_ds.errors import UserError
from flexlora_ds.fields import (
    Bounds,
    Group,
    OnResume,
    OptionSpec,
    choices,
    convert,
    nearest,
    option_specs,
    quote,
    remedy,
)
from flexlora_ds.patterns import pattern_fault

Importance = Literal[
    "entropy",
    "nuclear",
    "frobenius",
    "sensitivity",
    "elem_energy_entropy",
    "matrix_energy_entropy",
    "random",
    "reversed",
    "growth",
]
Direction = Literal["both", "prune", "expand"]
NewDirection = Literal["zero_impact", "small", "zero", "orthogonal", "gradient"]
NewMoment = Literal["own_age", "zero", "survivor_mean"]
Schedule = Literal["cubic", "cubic_fast", "linear", "exponential", "constant"]
Budget = Literal["ranks", "params"]
Init = Literal["auto", "gaussian", "gradient"]
RankOne = Literal["neutral", "lowest", "expand"]
Spectrum = Literal["lambda", "exact"]
OrthForm = Literal["decoupled", "norm", "squared"]
Auto = Literal["auto"]

ALL_LINEAR = "all-linear"

Count = Annotated[int, Bounds(least=0)]
Positive = Annotated[int, Bounds(least=1)]
AboveZero = Annotated[float, Bounds(above=0)]
NotNegative = Annotated[float, Bounds(least=0)]
Fraction = Annotated[float, Bounds(least=0, most=1)]

ADAPTER = Group("Adapter")
RANK_CHANGES = Group("Rank changes")
OPTIMIZATION = Group("Optimization")
MUST_MATCH = OnResume.MUST_MATCH


@dataclass(frozen=True)
class FlexLoRAConfig:
    """What is adapted, how ranks change, and how the adapter is kept orthogonal.

    The line under a field is its help text; what an option may be stands in its type (`flexlora_ds.fields`).

    Raises:
        UserError: a value has the wrong type, is out of range, or contradicts another option.
    """

    given_as_text: ClassVar[bool] = False
    """Whether values may be words of a command line."""

    rank: Annotated[int, Bounds(least=1, most=65_536), ADAPTER, MUST_MATCH] = 8
    """Rank of every matrix at the start. The scale is alpha / rank for the run, whatever ranks become."""
    alpha: Annotated[AboveZero, ADAPTER, MUST_MATCH] = 16.0
    """Numerator of the scale."""
    dropout: Annotated[float, Bounds(least=0, below=1), ADAPTER] = 0.05
    """Probability of dropping an element of an adapter's input."""
    target_modules: Annotated[tuple[str, ...], ADAPTER, MUST_MATCH] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "up_proj",
        "down_proj",
    )
    """Which linear layers are adapted: name suffixes, regular expressions for whole names, or all-linear."""

    adjust_size: Annotated[Count, RANK_CHANGES] = 4
    """The most directions that one rank change moves; 0 keeps all ranks fixed."""
    adjust_start: Annotated[Count | Auto, RANK_CHANGES] = "auto"
    """Steps before changes may begin; auto is 15.66 % of the run."""
    adjust_freeze: Annotated[Count | Auto, RANK_CHANGES] = "auto"
    """Steps at the end without a change; auto is 15.66 % of the run."""
    adjust_interval: Annotated[Positive | Auto, RANK_CHANGES] = "auto"
    """Steps from one change to the next; auto is 3.13 % of the run, but at least 20."""
    schedule: Annotated[Schedule, RANK_CHANGES] = "cubic"
    """How the size of a change falls from adjust_size over the calendar."""
    importance: Annotated[Importance, RANK_CHANGES] = "entropy"
    """What gives a matrix rank: a score read from its λ, or with growth prices, where only what pays is traded."""
    direction: Annotated[Direction, RANK_CHANGES] = "both"
    """Whether a change prunes, expands, or does both."""
    budget: Annotated[Budget, RANK_CHANGES] = "ranks"
    """What changes conserve: the sum of all ranks, or the number of parameters as an upper limit."""
    spectrum: Annotated[Spectrum, RANK_CHANGES] = "lambda"
    """Scores come from λ, or from the exact singular values of P diag(λ) Q."""
    min_rank: Annotated[Positive, RANK_CHANGES] = 1
    """No matrix is pruned below this rank."""
    max_rank: Annotated[Positive | None, RANK_CHANGES] = None
    """No matrix grows above this rank, nor above its own shape; none is 4 · rank."""
    rank_one: Annotated[RankOne, RANK_CHANGES] = "neutral"
    """How a matrix of rank 1 is scored, whose entropy is undefined."""
    grace: Annotated[Count, RANK_CHANGES] = 0
    """Changes during which a new direction neither counts in the entropy nor is pruned."""
    expand_min_energy: Annotated[Fraction, RANK_CHANGES] = 0.0
    """A quantile: matrices whose Σλ² is below it are not expanded."""
    new_direction: Annotated[NewDirection, RANK_CHANGES] = "zero_impact"
    """How a new direction begins: at random, or along the step's gradient; all but small change no output."""
    new_direction_std: Annotated[AboveZero | None, RANK_CHANGES] = None
    """Standard deviation of a new direction's P and Q; none follows init_std."""
    new_moment: Annotated[NewMoment, RANK_CHANGES] = "own_age"
    """The optimizer state that a new direction begins with."""
    orth_form: Annotated[OrthForm, RANK_CHANGES] = "decoupled"
    """How P and Q stay orthonormal: by a step of its own after the update, or by a term in the loss."""
    orth_weight: Annotated[NotNegative | None, RANK_CHANGES] = None
    """Strength of that; none is 0.05 for decoupled and 0.1 for the other two."""

    init: Annotated[Init, ADAPTER, MUST_MATCH] = "auto"
    """How P and Q begin: at random, or along the first batches' gradient; auto is gradient for a language model."""
    init_batches: Annotated[Positive, ADAPTER, MUST_MATCH] = 8
    """Batches whose gradient `init gradient` looks at, twice, and method lora_ga once; the output stays as it is."""
    init_std: Annotated[Literal["unit"] | AboveZero, ADAPTER] = "unit"
    """Standard deviation of a Gaussian P and Q; unit gives every direction an expected norm of 1."""
    lambda_lr: Annotated[Auto | Annotated[float, Bounds(above=0, most=10**6)], ADAPTER] = "auto"
    """Learning rate of λ as a multiple of lr: auto is √min(in, out) of the layer, 1 is the paper's."""
    weight_decay: Annotated[NotNegative, ADAPTER] = 0.0
    """Decoupled weight decay, of λ only (other methods: of all that they train)."""
    seed: Annotated[int, Bounds(least=0, below=2**63), OPTIMIZATION, MUST_MATCH] = 42
    """Seed of the data order, the dropout masks and everything that the method draws."""

    def __post_init__(self) -> None:
        for spec in option_specs(type(self)):
            object.__setattr__(self, spec.name, self._converted(spec, getattr(self, spec.name)))
        object.__setattr__(self, "target_modules", self._checked_targets())
        self._check_together()

    def place(self, key: str) -> str:
        """Where the value of a key was given, for a message's parentheses."""
        return f"key {key}"

    def _converted(self, spec: OptionSpec, value: object) -> Any:
        text = self.given_as_text
        try:
            return convert(value, spec.kind, text=text)
        except ValueError as error:
            todo = remedy(value, spec.kind, text=text)
            raise UserError(
                f"{spec.name} {quote(value, text=text)} {error}", self.place(spec.name), todo
            ) from error

    def _checked_targets(self) -> tuple[str, ...]:
        """`target_modules` without repetitions."""
        entries, place = self.target_modules, self.place("target_modules")
        for entry in entries:
            if fault := pattern_fault(entry):
                shown = quote(entry, text=False)
                raise UserError(
                    f"target_modules entry {shown} is neither a name nor a regular expression: {fault}",
                    place,
                    "correct it",
                )
        if ALL_LINEAR in entries and len(entries) > 1:
            raise UserError(f"{ALL_LINEAR} stands beside other entries", place, "give it alone")
        return tuple(dict.fromkeys(entries))

    def _check_together(self) -> None:
        if self.min_rank > self.rank:
            place = self.place("min_rank")
            raise UserError(f"min_rank {self.min_rank} is above rank {self.rank}", place, "lower it")
        if self.max_rank is not None and self.max_rank < self.rank:
            place = self.place("max_rank")
            raise UserError(f"max_rank {self.max_rank} is below rank {self.rank}", place, "raise it")
        if self.importance == "growth" and self.adjust_size and self.new_direction != "gradient":
            raise UserError(
                f"importance growth prices directions of the gradient, but new_direction is {self.new_direction}",
                self.place("importance"),
                "set new_direction gradient",
            )
        if self.orth_form == "decoupled" and self.orth_strength > 0.5:
            raise UserError(
                f"orth_weight {self.orth_weight} overshoots with orth_form decoupled",
                self.place("orth_weight"),
                "give at most 0.5",
            )

    def begins_from_gradient(self, *, language_model: bool) -> bool:
        """Whether P and Q begin along the gradient of the first batches; `auto` follows the kind of task.

        A language model learns sooner so, and ends level; an encoder with a new head does not (docs/results.md).
        """
        return self.init == "gradient" or (self.init == "auto" and language_model)

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
        values = {spec.name: getattr(self, spec.name) for spec in option_specs(type(self))}
        return values | {"target_modules": list(self.target_modules)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FlexLoRAConfig:
        """Build from a mapping; keys left out take their defaults.

        Raises:
            UserError: an unknown key (the nearest known one is named), or a value as in the constructor.
        """
        known = [spec.name for spec in option_specs(cls)]
        for key in values:
            if key not in known:
                close = nearest(str(key), known)
                todo = f"did you mean {close!r}?" if close else f"known: {', '.join(known)}"
                raise UserError(f"unknown option {key!r}", f"key {key}", todo)
        return cls(**values)

    def to_json(self) -> str:
        """All options as indented JSON text."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

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
                f"not valid JSON: {error.msg}", f"line {error.lineno}, column {error.colno}", "correct it"
            ) from error
        if not isinstance(values, dict):
            raise UserError(f"options are a JSON {type(values).__name__}", "top level", "give an object")
        return cls.from_dict(values)


CHOICES: dict[str, tuple[str, ...]] = {
    spec.name: choices(spec.kind)
    for spec in option_specs(FlexLoRAConfig)
    if len(choices(spec.kind)) > 1  # one word, such as auto, stands beside a number
}
"""The allowed words of every option that is a choice among words."""
