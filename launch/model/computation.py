"""How a base model computes in one run, every choice made."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from flexlora_ds.base_model.precision import Dtype
from launch.model.torch_compile import blocks_obstacle
from launch.options.train_options import Attention, Compile, Kernels


@dataclass(frozen=True)
class Computation:
    """Precision, kernels and the form of a micro-batch; the same on all processes."""

    dtype: Dtype
    attention: Attention
    packed: bool
    """Whether the examples of a micro-batch stand in one row, or are padded to one length."""
    kernels: Kernels
    compiled: Compile | None
    gradient_checkpointing: bool
    cuda_graphs: bool = False
    """Whether compiled layers are replayed for packed lengths that come again."""

    @property
    def compiled_layers(self) -> bool:
        """Whether whole layers are compiled, and take this run's micro-batches."""
        return self.compiled == "blocks" and blocks_obstacle(self.attention, packed=self.packed) is None

    @property
    def replayable(self) -> bool:
        """Whether this run's layers could be replayed, on a GPU."""
        return self.compiled_layers and self.packed and not self.gradient_checkpointing

    def words(self, given: Collection[str]) -> list[str]:
        """Every choice in words; those whose option is among `given` are marked."""
        named = {
            "dtype": self.dtype,
            "attention": self.attention,
            "padding_free": "packed" if self.packed else "padded",
            "kernels": f"kernels {self.kernels}",
            "compile": f"compile {self.compiled or 'none'}{self._not_applied()}",
            "gradient_checkpointing": f"activations {'recomputed' if self.gradient_checkpointing else 'kept'}",
        }
        if self.cuda_graphs:
            named["cuda_graphs"] = "replayed as CUDA graphs"
        return [f"{words} (given)" if key in given else words for key, words in named.items()]

    def _not_applied(self) -> str:
        if self.compiled != "blocks":
            return ""
        obstacle = blocks_obstacle(self.attention, packed=self.packed)
        return f", which is NOT APPLIED: {obstacle}" if obstacle else ""
