"""Whether a checkpoint and a run belong together: what must be equal, what may change and is said, what is free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from flexlora_ds.checkpoint.state import Checkpoint
from flexlora_ds.config import FlexLoRAConfig
from flexlora_ds.errors import RunError
from flexlora_ds.fields import OnResume, option_specs
from launch.options.method_traits import TRAITS
from launch.options.train_options import SPECS, TrainOptions
from launch.run_folder.json_files import to_json

_METHODS_OWN = frozenset(spec.name for spec in option_specs(FlexLoRAConfig))
_USE_ITS_VALUE = "use its value, or choose another out"
_GIVE_ITS_DAY = "give the day it began as template_date, or choose another out"


@dataclass(frozen=True)
class Base:
    """Which base model; the fingerprint decides, the rest is for the message."""

    name: str
    """As given: a hub id or a path."""
    revision: str | None
    """The hub's commit; None for a model on disk."""
    fingerprint: str
    """Of its files (`flexlora_ds.base_model.fingerprint`)."""

    def __str__(self) -> str:
        return f"{self.name} at {self.revision}" if self.revision else self.name


@dataclass(frozen=True)
class Identity:
    """What a run is a run of."""

    base: Base | None
    """None: not looked at, as a dry run would have to fetch its files."""
    data: str
    """Of the tokenised training examples."""
    total_steps: int
    options: Mapping[str, Any]
    adapter: str | None = None
    """The fingerprint of the adapter that it began with."""

    @classmethod
    def of(
        cls,
        options: TrainOptions,
        base: Base | None,
        data: str,
        total_steps: int,
        adapter: str | None = None,
    ) -> Identity:
        """The identity of a run about to begin."""
        values = {spec.name: getattr(options, spec.name) for spec in SPECS}
        plain = {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}
        return cls(base, data, total_steps, plain, adapter)

    def to_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return asdict(self)

    def compare(self, checkpoint: Checkpoint) -> list[str]:
        """What the checkpoint's run did otherwise and this one may: sentences for the log.

        Raises:
            RunError: the checkpoint is of another method, model or data, or an option that binds differs.
        """
        saved = checkpoint.run.get("identity", {})
        options = {spec.name: spec.default for spec in SPECS}  # an option younger than the checkpoint
        options.update(saved.get("options", {}))
        names = [name for name in self.options if to_json(self.options[name]) != to_json(options.get(name))]
        traits = TRAITS[self.options["method"]]
        names = [name for name in names if name not in _METHODS_OWN or traits.looks_at(name)]
        undated = "template_date" in names and options["template_date"] == "auto"
        if undated:  # older runs did not record the day; their examples tell whether it is another
            names.remove("template_date")
        if "init" in names and "auto" in (options["init"], self.options["init"]):
            names.remove(
                "init"
            )  # it has begun; what `auto` means has changed since older runs, and may again
        on_resume = {spec.name: spec.on_resume for spec in SPECS}
        for name in names:
            if on_resume[name] is OnResume.MUST_MATCH:
                _refuse(checkpoint, name, options.get(name), self.options[name])
        base = _base_of(saved)
        if self.base is not None and base.fingerprint != self.base.fingerprint:
            _refuse(checkpoint, "base model", base, f"{self.base} (its files differ)")
        if saved.get("adapter") != self.adapter:
            here = f"{self.options['init_adapter'] or 'none'} (its files differ)"
            _refuse(checkpoint, "init_adapter", options.get("init_adapter") or "none", here)
        if saved.get("data") != self.data:
            _refuse(
                checkpoint,
                "training data",
                options.get("data"),
                f"{self.options['data']} (its examples differ)",
                _GIVE_ITS_DAY if undated else _USE_ITS_VALUE,
            )
        changed = [n for n in names if on_resume[n] is OnResume.IS_SAID]
        differences = [f"{name} {_show(options.get(name))} → {_show(self.options[name])}" for name in changed]
        if saved.get("total_steps") != self.total_steps:
            differences.append(f"steps {saved.get('total_steps')} → {self.total_steps}")
        if checkpoint.step > self.total_steps:
            _refuse(
                checkpoint, "number of steps", f"at {checkpoint.step} already", f"only {self.total_steps}"
            )
        return differences


def _base_of(saved: Mapping[str, Any]) -> Base:
    there = saved.get("base")
    known = there if isinstance(there, dict) else {}
    return Base(str(known.get("name")), known.get("revision"), str(known.get("fingerprint")))


def _refuse(
    checkpoint: Checkpoint, what: str, there: object, here: object, remedy: str = _USE_ITS_VALUE
) -> None:
    raise RunError(
        f"the checkpoint is of another run: {what} is {_show(there)} in it and {_show(here)} here",
        str(checkpoint.folder),
        remedy,
    )


def _show(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
