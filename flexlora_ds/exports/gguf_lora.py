"""llama.cpp's adapter file: a LoRA as GGUF, under llama.cpp's names, at one rank for all matrices.

llama.cpp (`llama-adapter.h`, `get_scale`) multiplies B A of each matrix by alpha / its own rank, with one alpha for the
file. So matrices of other ranks than the first are padded with zeros, alpha is that rank, and B bears the scale. Of the
llama architecture it stores the rows of q and k in another order: the two halves of each head interleaved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexlora_ds.errors import UserError
from flexlora_ds.exports.checks import Check, update_check
from flexlora_ds.exports.padding import padded
from flexlora_ds.peft_format import LoraAdapter, LoraMatrix, max_relative_difference, require_finite_adapter

ADAPTER_FILE = "adapter.gguf"
_INTERLEAVED = "llama"
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""llama.cpp's name by transformers' `model_type`."""
_MERGE = "export it with --to merged, and convert that with llama.cpp"


@dataclass(frozen=True)
class GgufNames:
    """How llama.cpp names and lays out the weights of a model."""

    architecture: str
    blocks: int
    heads: Mapping[str, int]
    """By the last part of a module's name, where its rows are interleaved by head."""
    tied: bool

    @classmethod
    def of(cls, config: Any) -> GgufNames:
        """Of transformers' configuration of a model. UserError for a kind that is not known here."""
        architecture = _ARCHITECTURES.get(config.model_type)
        if architecture is None:
            known = ", ".join(_ARCHITECTURES)
            raise UserError(f"--to gguf-lora knows {known}, and the base is {config.model_type}", mend=_MERGE)
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        interleaved = heads if architecture == _INTERLEAVED else {}
        return cls(architecture, config.num_hidden_layers, interleaved, bool(config.tie_word_embeddings))

    def names(self, modules: Any) -> dict[str, str]:
        """llama.cpp's name of each module's weight. UserError for one that it does not have."""
        import gguf

        kind = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[self.architecture]
        known = gguf.get_tensor_name_map(kind, self.blocks)
        found = {name: known.get_name(f"{name}.weight", (".weight",)) for name in modules}
        for name, there in found.items():
            if there is None or (self.tied and there == "output.weight"):
                raise UserError(f"llama.cpp has no weight of its own for {name}", mend=_MERGE)
        return found

    def stored(self, name: str, B: Tensor) -> Tensor:
        """B [out, r] in llama.cpp's order of rows."""
        heads = self.heads.get(name.rpartition(".")[2])
        return B if heads is None else B.view(heads, 2, -1, B.shape[1]).transpose(1, 2).reshape(B.shape)

    def read(self, name: str, B: Tensor) -> Tensor:
        """The inverse of `stored`."""
        heads = self.heads.get(name.rpartition(".")[2])
        return B if heads is None else B.view(heads, -1, 2, B.shape[1]).transpose(1, 2).reshape(B.shape)


def write_gguf_lora(path: Path, adapter: LoraAdapter, config: Any) -> None:
    """Write an adapter for `llama-server --lora`, in fp32.

    Args:
        config: transformers' configuration of the base.

    Raises:
        UserError: a base or a matrix that llama.cpp names otherwise. RunError: numbers that are not finite.
    """
    import gguf

    names = GgufNames.of(config)
    uniform = padded(adapter)
    require_finite_adapter(uniform, str(path))
    places = names.names(uniform.matrices)
    writer = gguf.GGUFWriter(path, names.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, uniform.default_alpha)
    for name, matrix in uniform.matrices.items():
        writer.add_tensor(f"{places[name]}.lora_a", _array(matrix.A))
        writer.add_tensor(f"{places[name]}.lora_b", _array(names.stored(name, matrix.B)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf_lora(path: Path, adapter: LoraAdapter, config: Any) -> LoraAdapter:
    """The file's matrices as llama.cpp scales them, under the module names of `adapter`; none for what is missing."""
    import gguf

    names = GgufNames.of(config)
    reader = gguf.GGUFReader(path)
    alpha = float(reader.get_field(gguf.Keys.Adapter.LORA_ALPHA).contents())
    tensors = {t.name: torch.from_numpy(np.array(t.data, dtype=np.float32)) for t in reader.tensors}
    found = {}
    for name, place in names.names(adapter.matrices).items():
        A, B = (tensors.pop(f"{place}.lora_{part}", None) for part in "ab")
        if A is not None and B is not None:
            found[name] = LoraMatrix(names.read(name, B), A, alpha / A.shape[0])
    found |= dict.fromkeys(tensors, LoraMatrix(torch.zeros(1, 1), torch.zeros(1, 1), 0.0))
    return replace(adapter, matrices=found)


def check_gguf_lora(path: Path, adapter: LoraAdapter, config: Any) -> Check:
    """Every ΔW of the file, read back, beside that of its source."""
    return update_check(max_relative_difference(adapter, read_gguf_lora(path, adapter, config)))


def _array(values: Tensor) -> Any:
    return np.ascontiguousarray(values.detach().float().cpu().numpy())
