"""What an export is compared with before it counts: its source's tensors, and its source's logits on the base.

The logits of a source come from another reader than the export: PEFT reads an adapter's own folder, and a checkpoint's
matrices act on the activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from flexlora_ds.base_model.blueprint import NotCausalError
from flexlora_ds.base_model.loading import load_causal_lm, native_dtype
from flexlora_ds.errors import RunError, UserError
from flexlora_ds.exports.merging import adapted_weight
from flexlora_ds.exports.probe import adapted_logits, logits_apart, most_apart, probe_logits
from flexlora_ds.orientation import is_transposed
from flexlora_ds.peft_format import LoraAdapter, LoraMatrix, max_relative_difference
from flexlora_ds.peft_reading.plain import read_peft_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_UPDATE_TOLERANCE = 1e-5  # of max |ΔW|: fp32 products of the same numbers, summed in another order


@dataclass(frozen=True)
class Check:
    """What reading an export back showed: `figure` must not exceed `limit`."""

    meaning: str
    figure: float
    limit: float
    mend: str = "the disk or memory may be faulty, export again"

    def require(self, folder: Path) -> None:
        """Raise RunError if the export is not what it was made from."""
        if not self.figure <= self.limit:
            raise RunError(f"{folder}: {self}", mend=self.mend)

    def __str__(self) -> str:
        return f"{self.meaning}: {self.figure:.2g} (limit {self.limit:.2g})"


def check_update(adapter: LoraAdapter, folder: Path) -> Check:
    """Every ΔW of an exported adapter, read back, beside that of its source."""
    return update_check(max_relative_difference(adapter, read_peft_adapter(folder)))


def update_check(figure: float) -> Check:
    """What reading an adapter back showed: `figure` as of `max_relative_difference`."""
    return Check("the largest relative difference of an update read back", figure, _UPDATE_TOLERANCE)


def check_adapter(adapter: LoraAdapter, folder: Path, base: str) -> Check:
    """The logits of the base with an exported adapter, as PEFT loads it, beside those with its source.

    Raises:
        UserError: no base, or one that the adapter does not fit.
    """
    model, dtype = _base_of(adapter, base)
    expected = source_logits(model, adapter)
    return logits_check(adapted_logits(model, folder), expected, dtype)


def check_reading(adapter: LoraAdapter, base: str) -> Check:
    """The logits of the base with an adapter as it was read, beside those that PEFT gets from the same folder.

    Raises:
        UserError: as `check_adapter`.
    """
    model, dtype = _base_of(adapter, base)
    return logits_check(_read_logits(model, adapter), source_logits(model, adapter), dtype)


def _base_of(adapter: LoraAdapter, base: str) -> tuple[PreTrainedModel, torch.dtype]:
    if not base:
        raise UserError("the adapter does not say which base it is for", mend="name its base with --base")
    try:
        dtype = native_dtype(base, adapter.revision)
        model = load_causal_lm(base, dtype=dtype, revision=adapter.revision)
    except NotCausalError as error:
        raise UserError(
            error.fault, error.place, "merge it with PEFT's merge_and_unload: exports are of language models"
        ) from None
    except UserError as error:
        raise UserError(
            error.fault, error.place, "the export is checked on its base: name it with --base"
        ) from None
    return model, dtype


def source_logits(model: PreTrainedModel, adapter: LoraAdapter) -> Tensor:
    """`probe_logits` of a base model with an adapter that no export has written; the base is as before afterwards."""
    for name, matrix in adapter.matrices.items():
        adapted_weight(model, name, matrix)
    if adapter.folder is not None:
        return adapted_logits(model, adapter.folder)
    return _read_logits(model, adapter)


def _read_logits(model: PreTrainedModel, adapter: LoraAdapter) -> Tensor:
    hooks = [
        model.get_submodule(name).register_forward_hook(_adds(matrix))
        for name, matrix in adapter.matrices.items()
    ]
    logits = probe_logits(model)
    for hook in hooks:
        hook.remove()
    return logits


def _adds(matrix: LoraMatrix) -> Callable[..., Tensor]:
    """A hook that adds scale · B A x to a layer's output, in fp32."""

    def add(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        update = linear(linear(inputs[0].float(), matrix.A.float()), matrix.B.float())
        return (output.float() + matrix.scale * update).to(output.dtype)

    return add


@torch.no_grad()
def check_merged(
    before: PreTrainedModel, after: PreTrainedModel, adapter: LoraAdapter, dtype: torch.dtype
) -> Check:
    """The largest error of a merged weight in units of the dtype's rounding; other tensors must be equal."""
    merged = dict(after.state_dict())
    worst = 0.0
    for key, old in before.state_dict().items():
        matrix = adapter.matrices.get(key.removesuffix(".weight"))
        new = merged.pop(key, None)
        if new is None or new.shape != old.shape:
            worst = math.inf
        elif matrix is None:
            worst = worst if torch.equal(new, old) else math.inf
        else:
            turned = is_transposed(before.get_submodule(key.removesuffix(".weight")))
            expected = old.double() + (matrix.delta().t() if turned else matrix.delta()).double()
            worst = max(
                worst, float(((new.double() - expected).abs() / rounding(expected, old, dtype)).max())
            )
    if merged:
        worst = math.inf
    return merged_check(worst, dtype)


def merged_check(worst: float, dtype: torch.dtype) -> Check:
    """What `check_merged` says: `worst` in units of the rounding."""
    return Check(f"the largest error of a merged weight, in units of the rounding of {dtype}", worst, 1.0)


def check_merged_logits(
    before: PreTrainedModel, after: PreTrainedModel, adapter: LoraAdapter, dtype: torch.dtype
) -> Check:
    """The logits of the merged model beside those of the base with the adapter."""
    return logits_check(probe_logits(after), source_logits(before, adapter), dtype)


def logits_check(found: Tensor, expected: Tensor, dtype: torch.dtype) -> Check:
    """Logits of an export beside those of its source, each as `probe_logits` gives them."""
    return Check(
        "the largest difference of logits from those of the unmerged adapter, as a share of their norm",
        logits_apart(found, expected, dtype),
        most_apart(dtype),
        "it is more than LoRA as read here: merge it into its base with PEFT itself",
    )


def rounding(expected: torch.Tensor, old: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The spacing of `dtype` at each expected value, plus that of fp32 at the two terms of the sum."""
    terms = old.abs().double() + (expected - old.double()).abs().max()
    spacing = torch.finfo(dtype).eps * expected.abs() + torch.finfo(torch.float32).eps * terms
    return spacing.clamp_min(torch.finfo(dtype).tiny)
