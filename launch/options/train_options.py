"""Every option of a training run: one dataclass, from which parsing, checks and help texts come.

Values come from a recipe file and the command line (which wins). Importing this module imports no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

import yaml

from data_prep.tasks import TASKS
from flexlora_ds.config import (
    ADAPTER,
    OPTIMIZATION,
    RANK_CHANGES,
    Auto,
    Count,
    FlexLoRAConfig,
    Fraction,
    NotNegative,
    Positive,
)
from flexlora_ds.errors import UserError
from flexlora_ds.fields import Bounds, Group, IsPath, OnResume, OptionSpec, option_specs
from flexlora_ds.terminal.plain_text import printable
from launch.options.method_traits import TRAITS, MethodTraits
from launch.options.sources import Given, find_recipe, read_arguments, read_recipe, read_yaml

Dtype = Literal["fp32", "bf16", "fp16"]
Method = Literal["flexlora", "lora", "rslora", "dora", "pissa", "olora", "lora_ga", "adalora", "peft", "full"]
Attention = Literal["flash", "varlen", "sdpa", "eager"]
Kernels = Literal["liger", "none"]
Compile = Literal["pieces", "blocks"]
LrSchedule = Literal["linear", "cosine", "constant"]
Prompt = Literal["alpaca", "llm_adapters", "chat"]
if TYPE_CHECKING:
    Task: TypeAlias = str
else:
    Task = Literal[tuple(TASKS)]  # a ninth task is an option as soon as it is defined
EvalMode = Literal["score", "generate"]
TrackerName = Literal["tensorboard", "wandb", "trackio", "mlflow"]

PathText = Annotated[str, IsPath()]
Seconds = Annotated[int, Bounds(least=10, most=86_400)]

DEFAULT_RECIPE = "launch/recipes/llama3_8b_r8.yaml"

DATA = Group("Model and data")
EXAMPLES = Group("Training examples")
SPEED = Group("Speed and memory")
LOGS = Group("Logs and checkpoints")
GROUPS = (DATA, ADAPTER, RANK_CHANGES, OPTIMIZATION, EXAMPLES, SPEED, LOGS)
"""The headings of help texts, in order."""
MAY_CHANGE, MUST_MATCH = OnResume.MAY_CHANGE, OnResume.MUST_MATCH


@dataclass(frozen=True)
class TrainOptions(FlexLoRAConfig):
    """All options of a run, those of the method among them; text is converted to the annotated types.

    The line under a field is its help text; what an option may be stands in its type (`flexlora_ds.fields`).

    Raises:
        UserError: a value is not allowed; the message names the key, where it was given, and what to give.
    """

    given_as_text: ClassVar[bool] = True

    model: Annotated[PathText, DATA, MAY_CHANGE] = ""
    """Base model: a hub id, a local folder, or a .gguf file (loaded dequantised). Every recipe names one."""
    data: Annotated[PathText, DATA, MAY_CHANGE] = "data/commonsense_170k.json"
    """Training records {instruction, input, output, answer} or chats {messages}: JSON or JSON lines, also .gz."""
    out: Annotated[PathText, DATA, MAY_CHANGE] = ""
    """The run folder, the same in every restart of the run. Empty means runs/<recipe name>."""
    recipe: Annotated[PathText, DATA, MAY_CHANGE] = field(default=DEFAULT_RECIPE, compare=False)
    """A YAML file with any of these keys, or the bare name of a shipped recipe."""
    ds: Annotated[PathText, DATA, MAY_CHANGE] = "ds_configs/zero2.json"
    """DeepSpeed's JSON; its auto values are filled in from these options."""

    method: Annotated[Method, ADAPTER, MUST_MATCH] = "flexlora"
    """What is trained: FlexLoRA; for comparison PEFT's methods, any adapter of peft_config, or all weights (full)."""
    peft_config: Annotated[PathText | None, ADAPTER, MAY_CHANGE] = None
    """With method peft: a JSON file as PEFT's adapter_config.json, which names the kind and its settings."""
    match_params: Annotated[str | None, ADAPTER, MAY_CHANGE] = None
    """Take the rank that trains as many parameters as lora:RANK, or as this number, on the mean over the run."""

    init_adapter: Annotated[PathText, ADAPTER, MAY_CHANGE] = ""
    """A PEFT LoRA to go on from, a folder or a hub id: its update becomes P, λ and Q (method flexlora). Empty: none."""
    init_rank_budget: Annotated[Positive | None, ADAPTER, MUST_MATCH] = None
    """The most directions to keep of init_adapter, by one threshold over all its singular values; none keeps all."""

    epochs: Annotated[float, Bounds(above=0, most=10**6), OPTIMIZATION, MAY_CHANGE] = 3.0
    """Passes over the training records; parts of one are allowed."""
    max_steps: Annotated[Annotated[int, Bounds(least=1, most=10**12)] | None, OPTIMIZATION, MAY_CHANGE] = None
    """Stop after this many steps, whatever epochs says."""
    batch_size: Annotated[int, Bounds(least=1, most=10**6), OPTIMIZATION, MUST_MATCH] = 16
    """Records in one update: micro-batch × accumulation × processes."""
    micro_batch_size: Annotated[Positive | Auto, OPTIMIZATION, MAY_CHANGE] = "auto"
    """Records that a process computes at once; auto is the largest that fits the memory estimate."""
    lr: Annotated[float, Bounds(above=0, most=1e30), OPTIMIZATION] = 3e-4
    """Learning rate after the warm-up."""
    lr_schedule: Annotated[LrSchedule, OPTIMIZATION] = "linear"
    """How lr falls after the warm-up, counted in applied updates."""
    warmup_steps: Annotated[Count, OPTIMIZATION] = 100
    """Applied updates over which lr rises linearly."""
    min_lr_ratio: Annotated[Fraction, OPTIMIZATION] = 0.0
    """Where linear and cosine end, as a fraction of lr."""
    max_grad_norm: Annotated[NotNegative, OPTIMIZATION] = 1.0
    """Gradients are clipped to this norm; 0 does not clip."""

    prompt: Annotated[Prompt, EXAMPLES, MUST_MATCH] = "alpaca"
    """The prompt around a record; llm_adapters is the published one, chat the tokenizer's template (as for chats)."""
    template_date: Annotated[str, EXAMPLES, MUST_MATCH] = "auto"
    """The date that a chat template is given, where it asks for one: YYYY-MM-DD; auto is the day a run first began."""
    cutoff_len: Annotated[Positive, EXAMPLES, MUST_MATCH] = 256
    """Tokens in an example at most; longer records are dropped and counted, never shortened."""
    train_on_inputs: Annotated[bool, EXAMPLES, MUST_MATCH] = False
    """Whether the loss covers the prompt as well as the answer."""
    val_size: Annotated[Count, EXAMPLES, MUST_MATCH] = 120
    """Records held out for the validation loss."""

    dtype: Annotated[Dtype | Auto, SPEED, MAY_CHANGE] = "auto"
    """Precision of weights and activations (masters are fp32); auto is bf16 on a GPU (an old one: fp16), else fp32."""
    attention: Annotated[Attention | Auto, SPEED, MAY_CHANGE] = "auto"
    """Attention kernels; auto: flash where it runs, else varlen (torch's own), else sdpa; varlen first with blocks."""
    gradient_checkpointing: Annotated[bool | Auto, SPEED, MAY_CHANGE] = "auto"
    """Whether activations are recomputed in the backward pass; auto does so where memory needs it."""
    padding_free: Annotated[bool | Auto, SPEED, MAY_CHANGE] = "auto"
    """Whether a micro-batch's examples are packed, or padded; auto: packed with flash, varlen or no GPU."""
    group_by_length: Annotated[bool, SPEED, MUST_MATCH] = False
    """Whether batches are made of records of like length: less padding, but other records share a batch."""
    kernels: Annotated[Kernels | Auto, SPEED, MAY_CHANGE] = "auto"
    """The base's norm, rotary embedding and SwiGLU: Liger's fused kernels or none; auto is liger where it runs."""
    compile: Annotated[bool | Compile | Auto, SPEED, MAY_CHANGE] = "auto"
    """What torch compiles: blocks (whole layers, not at ZeRO-3), pieces (norm and SwiGLU; true means these) or nothing;
    auto is blocks for FlexLoRA in bf16 on a GPU, where they can be."""
    cuda_graphs: Annotated[bool, SPEED, MAY_CHANGE] = False
    """Whether compiled blocks are replayed as CUDA graphs for packed lengths that come again; tried on one GPU."""

    memory_check: Annotated[bool | Auto, SPEED, MAY_CHANGE] = "auto"
    """Whether the largest micro-batch is tried before the first step, so that no later one runs out; auto: on a GPU."""

    log_every: Annotated[Positive, LOGS, MAY_CHANGE] = 10
    """Steps between lines of metrics.jsonl."""
    val_every: Annotated[Count | Auto, LOGS, MAY_CHANGE] = "auto"
    """Steps between validations, 0 for none; auto is at both ends and around every rank change."""
    eval_every: Annotated[Count, LOGS, MAY_CHANGE] = 0
    """Steps between accuracies of the live model on the commonsense tests, the last after the run; 0 for none."""
    eval_items: Annotated[Positive, LOGS, MAY_CHANGE] = 200
    """Items of each task, from the first."""
    eval_tasks: Annotated[tuple[Task, ...] | None, LOGS, MAY_CHANGE] = None
    """Which tasks; none is all of them."""
    eval_mode: Annotated[EvalMode, LOGS, MAY_CHANGE] = "score"
    """How they are asked, as python -m eval does: the likeliest of an item's answers, or one that is generated."""
    eval_data: Annotated[PathText, LOGS, MAY_CHANGE] = ""
    """The folder of the tests, with TASK/test.json. Empty means the folder of data."""
    weigh_directions: Annotated[bool, LOGS, MAY_CHANGE] = True
    """Whether the end measures what the new directions of each rank change are worth, by one validation a change."""
    save_every: Annotated[Count, LOGS, MAY_CHANGE] = 1000
    """Steps between checkpoints; 0 saves only at the end."""
    keep_checkpoints: Annotated[Positive, LOGS, MAY_CHANGE] = 2
    """How many of the newest checkpoints stay on disk."""
    track: Annotated[tuple[TrackerName, ...] | None, LOGS, MAY_CHANGE] = None
    """Dashboards that follow the run, each by its own library."""
    resume: Annotated[PathText, LOGS, MAY_CHANGE] = "auto"
    """auto continues out where it stopped, none refuses a non-empty out, else the path of a checkpoint."""
    timeout: Annotated[Seconds, LOGS, MAY_CHANGE] = 300
    """Seconds without a sign of life after which a process or host is gone; the longest wait for one in a step."""
    dry_run: Annotated[bool, LOGS, MAY_CHANGE] = False
    """Print on one page what would happen, and stop."""
    debug: Annotated[bool, LOGS, MAY_CHANGE] = False
    """Show the tracebacks of errors."""

    places: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    """Where each value was given, for messages."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.out:
            object.__setattr__(self, "out", f"runs/{Path(self.recipe).stem}")

    def _check_together(self) -> None:
        """Only what the method looks at: other options have no effect, and contradict nothing."""
        if self.traits.changes_ranks:
            super()._check_together()

    @property
    def prompt_date(self) -> str | None:
        """The date that the chat template is given; None where it asks for none, or the day is not settled yet."""
        return None if self.template_date == "auto" else self.template_date

    @property
    def traits(self) -> MethodTraits:
        """What sets the method apart from others."""
        return TRAITS[self.method]

    def place(self, key: str) -> str:
        """Where the value of a key was given, for a message's parentheses."""
        return self.places.get(key, f"key {key}")

    def replace(self, **changes: Any) -> TrainOptions:
        """A copy in which `auto` or other values are settled; validated like the original."""
        return dataclasses.replace(self, **changes)

    def to_flexlora_config(self) -> FlexLoRAConfig:
        """The options of the library's method; the defaults stand for those that this run's method does not look at."""
        names = [spec.name for spec in option_specs(FlexLoRAConfig) if self.traits.looks_at(spec.name)]
        return FlexLoRAConfig(**{name: getattr(self, name) for name in names})

    def to_yaml(self) -> str:
        """All options under their headings; as a recipe the text repeats the run."""
        lines = [
            f"# Made from {printable(self.recipe)}; repeat with --recipe <this file> --out <another folder>."
        ]
        for group, specs in by_group():
            lines += ["", f"# {group.title}"]
            for spec in specs:
                value = getattr(self, spec.name)
                plain = list(value) if isinstance(value, tuple) else value
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


def by_group() -> list[tuple[Group, list[OptionSpec]]]:
    """The options under their headings, in the order of help texts: a run's own before those of the method."""
    specs = sorted(option_specs(TrainOptions), key=lambda spec: spec.owner is not TrainOptions)
    return [(group, [spec for spec in specs if spec.group is group]) for group in GROUPS]


SPECS: tuple[OptionSpec, ...] = tuple(spec for _, specs in by_group() for spec in specs)
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
        raise UserError("no model is named", str(options.recipe), "add a line model: ..., or give --model")
    return options


def _recipe_keys() -> list[str]:
    """What a recipe may hold: all but the name of another recipe."""
    return [spec.name for spec in SPECS if spec.name != "recipe"]


def _short(path: Path) -> str:
    """A path as seen from the working directory, where it is below it."""
    absolute = path.resolve()
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(path)


def _yaml_line(key: str, value: object) -> str:
    text = yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=10_000)
    return f"{key}: {text.strip()[1:-1]}"
