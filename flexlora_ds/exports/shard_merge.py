"""A merged model written from its base's files, rows at a time: a model of any size in little memory.

Every file of the base becomes one of the merged model, under the base's own names. What no matrix adapts is copied.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from flexlora_ds.base_model.blueprint import StoredModel, blueprint
from flexlora_ds.base_model.model_folder import stored_shapes
from flexlora_ds.base_model.source import ModelSource, locate, one_line_errors
from flexlora_ds.base_model.stored_names import Places, tie
from flexlora_ds.exports.checks import Check, merged_check, rounding
from flexlora_ds.exports.merging import adapted_weight, require_within
from flexlora_ds.files.tensor_stream import DTYPES, Layout, TensorFile, TensorReader
from flexlora_ds.orientation import is_transposed
from flexlora_ds.peft_format import LoraAdapter, LoraMatrix

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_INDEX = "model.safetensors.index.json"
_GENERATION = "generation_config.json"


@dataclass(frozen=True)
class Addition:
    """What is added to one stored weight."""

    matrix: LoraMatrix
    turned: bool
    """The weight is [in, out], as Conv1D stores it."""

    def rows(self, rows: slice) -> Tensor:
        """These rows of ΔW, or of its transpose, in fp32."""
        B, A = self.matrix.B, self.matrix.A
        product = A[:, rows].T.float() @ B.T.float() if self.turned else B[rows].float() @ A.float()
        return self.matrix.scale * product


@dataclass(frozen=True)
class ShardedBase:
    """A base whose files hold every adapted weight as it is, so that they can be merged file by file."""

    source: ModelSource
    stored: StoredModel
    places: Places | None
    """None where other weights are converted while they load (stacked experts): these are copied as they are stored."""
    additions: Mapping[str, Addition]
    """By stored name."""
    class_name: str

    @classmethod
    def of(cls, base: str, adapter: LoraAdapter, dtype: torch.dtype) -> ShardedBase | None:
        """None for a base that has to be held whole: a GGUF, quantised weights, an adapted weight that layers share.

        Raises:
            UserError: no base, or one that the adapter does not fit.
        """
        source = locate(base, adapter.revision)
        if source.gguf_file is not None or adapter.base_weights:
            return None
        with one_line_errors(source, "model"):
            stored = StoredModel(source, dtype)
            places, names = stored.places(), stored.read_as_it_is()
            if names is None:
                return None
            model = blueprint(source.name, stored.config, dtype, tied=places is None)
            if places is not None:
                tie(model, places.untied)
        additions = _additions(model, adapter, names if places is None else places.names)
        if additions is None or not all(_known(path) for path in stored.shards):
            return None
        return cls(source, stored, places, additions, type(model).__name__)

    def files(self, folder: Path) -> dict[Path, Path]:
        """The merged model's file in `folder` for each of the base's that holds something."""
        paths = [path for path, shapes in self.stored.shards.items() if self._names(shapes)]
        if len(paths) == 1:
            return {paths[0]: folder / "model.safetensors"}
        count = len(paths)
        return {p: folder / f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i, p in enumerate(paths)}

    def _names(self, shapes: Mapping[str, Any]) -> list[str]:
        return [name for name in shapes if self.places is None or name in self.places.names]

    def merge(self, folder: Path, dtype: torch.dtype) -> None:
        """Write base + ΔW, added in fp32 and rounded once to `dtype`, with its configuration.

        Raises:
            RunError: a sum is beyond `dtype`. OSError: the disk refuses.
        """
        index: dict[str, str] = {}
        files = self.files(folder)
        for path, written in files.items():
            index |= dict.fromkeys(self._merge_file(path, written, dtype), written.name)
        if len(files) > 1:
            size = sum(written.stat().st_size for written in files.values())
            content = {"metadata": {"total_size": size}, "weight_map": index}
            (folder / _INDEX).write_text(json.dumps(content, indent=2) + "\n")
        config = self.stored.config
        config.dtype, config.architectures = dtype, [self.class_name]
        config.save_pretrained(folder)
        if (self.stored.folder / _GENERATION).is_file():
            shutil.copyfile(self.stored.folder / _GENERATION, folder / _GENERATION)

    def _merge_file(self, path: Path, written: Path, dtype: torch.dtype) -> list[str]:
        with ExitStack() as stack:
            base = stack.enter_context(TensorReader(path))
            layout = _layout(base, self._names(self.stored.shards[path]), dtype)
            out = stack.enter_context(TensorFile(written, layout))
            for name, (kind, _) in layout.items():
                addition = self.additions.get(name)
                for rows, values in base.pieces(name):
                    if addition is None:
                        out.write(values.to(kind))
                        continue
                    merged = (values.float() + addition.rows(rows)).to(kind)
                    require_within(name, merged)
                    out.write(merged)
        return list(layout)

    def check(self, folder: Path, dtype: torch.dtype) -> Check:
        """Every weight of the written files beside base + ΔW; as `checks.check_merged`, rows at a time."""
        there = stored_shapes(str(folder), folder)
        worst = 0.0
        files = self.files(folder)
        if set(there) != set(files.values()):
            return merged_check(math.inf, dtype)
        for path, written in files.items():
            expected = {n: self.stored.shards[path][n] for n in self._names(self.stored.shards[path])}
            if expected != there[written]:
                return merged_check(math.inf, dtype)
            worst = max([worst, *self._errors(path, written, dtype)])
        return merged_check(worst, dtype)

    def _errors(self, path: Path, written: Path, dtype: torch.dtype) -> Iterator[float]:
        with TensorReader(path) as base, TensorReader(written) as out:
            for name in self._names(self.stored.shards[path]):
                addition = self.additions.get(name)
                for (rows, old), (_, new) in zip(base.pieces(name), out.pieces(name), strict=True):
                    if addition is None:
                        yield 0.0 if torch.equal(old.to(new.dtype), new) else math.inf
                        continue
                    expected = old.double() + addition.rows(rows).double()
                    error = (new.double() - expected).abs() / rounding(expected, old, dtype)
                    yield float(error.max().nan_to_num(math.inf))


def _additions(
    model: PreTrainedModel, adapter: LoraAdapter, places: Mapping[str, str]
) -> dict[str, Addition] | None:
    """By stored name; None where an adapted weight is not stored as it is, or layers share it."""
    used = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    reached = Counter(id(child) for parent in model.modules() for child in parent._modules.values())
    stored = {place: name for name, place in places.items()}
    found = {}
    for name, matrix in adapter.matrices.items():
        weight, layer = adapted_weight(model, name, matrix), model.get_submodule(name)
        if used[id(weight)] > 1 or reached[id(layer)] > 1 or f"{name}.weight" not in stored:
            return None
        found[stored[f"{name}.weight"]] = Addition(matrix, is_transposed(layer))
    return found


def _known(path: Path) -> bool:
    """Whether every tensor of a file is of a dtype that can be written."""
    with safe_open(path, framework="pt") as file:
        return all(file.get_slice(name).get_dtype() in DTYPES for name in file.keys())  # noqa: SIM118


def _layout(file: TensorReader, names: list[str], dtype: torch.dtype) -> Layout:
    """Floating-point tensors in `dtype`, others as they are; wide ones first, so that all are aligned."""
    found = {name: file.layout(name) for name in names}
    kinds = {name: dtype if kind.is_floating_point else kind for name, (kind, _) in found.items()}
    return {n: (kinds[n], found[n][1]) for n in sorted(names, key=lambda name: -kinds[name].itemsize)}
