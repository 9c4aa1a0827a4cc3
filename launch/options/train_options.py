"""Every option of a training run: one dataclass, from which parsing, checks and help texts come.

Values come from a recipe file and the command line (which wins). Importing this module imports no torch.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from flexlora_ds.config import (
    Budget,
    Direction,
    FlexLoRAConfig,
    Importance,
    NewDirection,
    NewMoment,
    OrthForm,
    RankOne,
    Schedule,
    Spectrum,
)
from flexlora_ds.errors import UserError
from launch.options.fields import Bounds, OptionSpec, convert, mend, option_specs, show
from launch.options.sources import Given, find_recipe, read_arguments, read_recipe, read_yaml

Auto = Literal["auto"]
Dtype = Literal["fp32", "bf16", "fp16"]
Method = Literal["flexlora", "lora"]
Attention = Literal["flash", "varlen", "sdpa", "eager"]
Kernels = Literal["liger", "none"]
Compile = Literal["pieces", "blocks"]
LrSchedule = Literal["linear", "cosine", "constant"]
Prompt = Literal["alpaca", "llm_adapters", "chat"]
Count = Annotated[int, Bounds(least=0)]
Positive = Annotated[int, Bounds(least=1)]
AboveZero = Annotated[float, Bounds(above=0)]
NotNegative = Annotated[float, Bounds(least=0)]
Fraction = Annotated[float, Bounds(least=0, most=1)]

DEFAULT_RECIPE = "launch/recipes/llama3_8b_r8.yaml"

GROUPS: Mapping[str, str] = {
    "model": "Model and data",
    "method": "Adapter",
    "adjust_size": "Rank changes",
    "epochs": "Optimization",
    "prompt": "Examples",
    "dtype": "Speed and memory",
    "log_every": "Logs and checkpoints",
}
"""The headings of help texts, by the option that each begins with."""


@dataclass(frozen=True)
class TrainOptions:
    """All options of a run, validated when built; text is converted to the annotated types.

    The line under a field is its help text.

    Raises:
        UserError: a value is not allowed; the message names the key, where it was given, and what to give.
    """

    model: str = ""
    """Base model: a hub id, a local folder, or a .gguf file (loaded dequantised). Every recipe names one."""
    data: str = "data/commonsense_170k.json"
    """Training records {instruction, input, output, answer} or chats {messages}: JSON or JSON lines, also .gz."""
    out: str = ""
    """The run folder, the same in every restart of the run. Empty means runs/<recipe name>."""
    recipe: str = field(default=DEFAULT_RECIPE, compare=False)
    """A YAML file with any of these keys, or the bare name of a shipped recipe."""
    ds: str = "ds_configs/zero2.json"
    """DeepSpeed's JSON; its auto values are filled in from these options."""

    method: Method = "flexlora"
    """What is trained: FlexLoRA, or PEFT's LoRA in the same loop for comparison."""
    rank: Positive = 8
    """Rank of every matrix at the start. The scale is alpha / rank for the run, whatever ranks become."""
    alpha: AboveZero = 16.0
    """Numerator of the scale."""
    dropout: Annotated[float, Bounds(least=0, below=1)] = 0.05
    """Probability of dropping an element of an adapter's input."""
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
    """Which linear layers are adapted: name suffixes, regular expressions for whole names, or all-linear."""
    init_std: Literal["unit"] | AboveZero = "unit"
    """Standard deviation of P and Q at the start; unit gives every direction an expected norm of 1."""
    lambda_lr: Auto | AboveZero = "auto"
    """Learning rate of λ as a multiple of lr: auto is √min(in, out) of the layer, 1 is the paper's."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay, of λ only (method lora: of all that it trains)."""

    adjust_size: Count = 4
    """The most directions that one rank change moves; 0 keeps all ranks fixed."""
    adjust_start: Count | Auto = "auto"
    """Steps before changes may begin; auto is 15.65 % of the run."""
    adjust_freeze: Count | Auto = "auto"
    """Steps at the end without a change; auto is 15.65 % of the run."""
    adjust_interval: Positive | Auto = "auto"
    """Steps from one change to the next; auto is 3.13 % of the run."""
    schedule: Schedule = "cubic"
    """How the size of a change falls from adjust_size over the calendar."""
    importance: Importance = "entropy"
    """The score of a matrix, read from its λ: high scores gain directions, low scores lose them."""
    direction: Direction = "both"
    """Whether a change prunes, expands, or does both."""
    budget: Budget = "ranks"
    """What changes conserve: the sum of all ranks, or the number of parameters as an upper limit."""
    spectrum: Spectrum = "lambda"
    """Scores come from λ, or from the exact singular values of P diag(λ) Q."""
    min_rank: Positive = 1
    """No matrix is pruned below this rank."""
    max_rank: Positive | None = None
    """No matrix grows above this rank; none is 4 · rank."""
    rank_one: RankOne = "neutral"
    """How a matrix of rank 1 is scored, whose entropy is undefined."""
    grace: Count = 0
    """Changes during which a new direction neither counts in the entropy nor is pruned."""
    expand_min_energy: Fraction = 0.0
    """A quantile: matrices whose Σλ² lies below it are not expanded."""
    new_direction: NewDirection = "zero_impact"
    """How a new direction begins; all but small leave the model's output unchanged, zero never learns."""
    new_direction_std: AboveZero | None = None
    """Standard deviation of a new direction's P and Q; none follows init_std."""
    new_moment: NewMoment = "own_age"
    """The optimizer state that a new direction begins with."""
    orth_form: OrthForm = "decoupled"
    """How P and Q stay orthonormal: by a step of its own after the update, or by a term in the loss."""
    orth_weight: NotNegative | None = None
    """Strength of that; none is 0.05 for decoupled and 0.1 for the other two."""

    epochs: AboveZero = 3.0
    """Passes over the training records; parts of one are allowed."""
    max_steps: Positive | None = None
    """Stop after this many steps, whatever epochs says."""
    batch_size: Positive = 16
    """Records in one update: micro-batch × accumulation × processes."""
    micro_batch_size: Positive | Auto = "auto"
    """Records that a process computes at once; auto is the largest that fits the memory estimate."""
    lr: AboveZero = 3e-4
    """Learning rate after the warm-up."""
    lr_schedule: LrSchedule = "linear"
    """How lr falls after the warm-up, counted in applied updates."""
    warmup_steps: Count = 100
    """Applied updates over which lr rises linearly."""
    min_lr_ratio: Fraction = 0.0
    """Where linear and cosine end, as a fraction of lr."""
    max_grad_norm: NotNegative = 1.0
    """Gradients are clipped to this norm; 0 does not clip."""
    seed: Annotated[int, Bounds(least=0, below=2**63)] = 42
    """Seed of the data order, the dropout masks and everything that the method draws."""

    prompt: Prompt = "alpaca"
    """The prompt around a record; llm_adapters is the published one, chat the tokenizer's template (as for chats)."""
    cutoff_len: Positive = 256
    """Tokens in an example at most; longer records are dropped and counted, never cut."""
    train_on_inputs: bool = False
    """Whether the loss covers the prompt as well as the answer."""
    val_size: Count = 120
    """Records held out for the validation loss."""

    dtype: Dtype | Auto = "auto"
    """Precision of weights and activations (masters are always fp32); auto is bf16 on a GPU, else fp32."""
    attention: Attention | Auto = "auto"
    """Attention kernels; auto is flash where it runs, else varlen (torch's own) where it does, else sdpa."""
    gradient_checkpointing: bool | Auto = "auto"
    """Whether activations are recomputed in the backward pass; auto does so where memory needs it."""
    padding_free: bool | Auto = "auto"
    """Whether a micro-batch's examples lie end to end, or are padded; auto: the former with flash, varlen or no GPU."""
    group_by_length: bool = False
    """Whether batches are made of records of like length: less padding, but other records share a batch."""
    kernels: Kernels | Auto = "auto"
    """The base's norm, rotary embedding and SwiGLU: Liger's fused kernels or none; auto is liger where it runs."""
    compile: bool | Compile = False
    """What torch compiles: pieces (norm and SwiGLU; true means these) or blocks (whole layers, not at ZeRO-3)."""

    log_every: Positive = 10
    """Steps between lines of metrics.jsonl."""
    val_every: Count | Auto = "auto"
    """Steps between validations, 0 for none; auto is at both ends and around every rank change."""
    save_every: Count = 1000
    """Steps between checkpoints; 0 saves only at the end."""
    keep_checkpoints: Positive = 2
    """How many of the newest checkpoints stay on disk."""
    resume: str = "auto"
    """auto continues out where it stopped, none refuses a non-empty out, else the path of a checkpoint."""
    dry_run: bool = False
    """Print on one page what would happen, and stop."""
    debug: bool = False
    """Show the tracebacks of errors."""

    places: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    """Where each value was given, for messages."""

    def __post_init__(self) -> None:
        for spec in SPECS:
            object.__setattr__(self, spec.name, self._converted(spec, getattr(self, spec.name)))
        if not self.out:
            object.__setattr__(self, "out", f"runs/{Path(self.recipe).stem}")
        self.to_flexlora_config()

    def _converted(self, spec: OptionSpec, value: object) -> Any:
        try:
            return convert(value, spec.kind)
        except ValueError as error:
            told = mend(value, spec.kind)
            raise UserError(f"{spec.name} {show(value)} {error} ({self.place(spec.name)}); {told}") from error

    def place(self, key: str) -> str:
        """Where the value of a key was given, for a message's parentheses."""
        return self.places.get(key, f"key {key}")

    def replace(self, **changes: Any) -> TrainOptions:
        """A copy in which `auto` or other values are settled; validated like the original."""
        return dataclasses.replace(self, **changes)

    def compute_dtype(self) -> Dtype:
        """`dtype`, with `auto` settled by this machine: bf16 on a GPU (fp16 on old ones), fp32 on a CPU."""
        if self.dtype != "auto":
            return self.dtype
        import torch

        if not torch.cuda.is_available():
            return "fp32"
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"

    def to_flexlora_config(self) -> FlexLoRAConfig:
        """The part of the options that the library's method takes.

        Raises:
            UserError: as `FlexLoRAConfig`, with the place where the value was given.
        """
        names = [config_field.name for config_field in dataclasses.fields(FlexLoRAConfig)]
        try:
            return FlexLoRAConfig(**{name: getattr(self, name) for name in names})
        except UserError as error:
            placed = re.sub(r"\(key (\w+)\)", lambda match: f"({self.place(match[1])})", str(error))
            raise UserError(placed) from error

    def to_yaml(self) -> str:
        """All options under their headings; as a recipe the text repeats the run."""
        lines = [f"# Made from {self.recipe}; repeat with --recipe <this file> --out <another folder>."]
        for spec in SPECS:
            value = getattr(self, spec.name)
            plain = list(value) if isinstance(value, tuple) else value
            lines += ["", f"# {GROUPS[spec.name]}"] if spec.name in GROUPS else []
            lines += [_yaml_line(spec.name, plain)] if spec.name != "recipe" else []
        return "\n".join(lines) + "\n"

    @classmethod
    def from_yaml(cls, text: str, origin: str = "options.yaml") -> TrainOptions:
        """The options that `to_yaml` wrote; a recipe's text works as well.

        Raises:
            UserError: as `parse_options`.
        """
        given = read_yaml(text, origin, _recipe_keys())
        return cls(**given.values, places=given.places)


SPECS: tuple[OptionSpec, ...] = tuple(option_specs(TrainOptions))
"""Every option in the order of the help text."""


def parse_options(argv: Sequence[str]) -> TrainOptions:
    """The options of a command line (without the program's name) and of the recipe it names.

    Raises:
        UserError: no such recipe, an unknown or misspelt key, or a value that is not allowed.
    """
    typed = read_arguments(argv, [spec.name for spec in SPECS])
    recipe = find_recipe(str(typed.values.get("recipe", DEFAULT_RECIPE)))
    written = read_recipe(recipe, _recipe_keys())
    given = Given({**written.values, **typed.values}, {**written.places, **typed.places})
    options = TrainOptions(**{**given.values, "recipe": _short(recipe)}, places=given.places)
    if not options.model:
        raise UserError(f"no model is named ({options.recipe}); add a line model: ..., or give --model")
    return options


def _recipe_keys() -> list[str]:
    """What a recipe may hold: all but the name of another recipe."""
    return [spec.name for spec in SPECS if spec.name != "recipe"]


def _short(path: Path) -> str:
    """A path as seen from the working directory, where it lies below it."""
    absolute = path.resolve()
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(path)


def _yaml_line(key: str, value: object) -> str:
    text = yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=10_000)
    return f"{key}: {text.strip()[1:-1]}"
