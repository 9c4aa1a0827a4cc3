"""How many bytes a process needs at its peak, for the dry run and the `auto` micro-batch (estimated)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from flexlora_ds.partitions.unsupported import lookup

GIB = 2**30
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
MASTER = 4
"""Bytes of an fp32 master weight and of every per-element optimizer state."""
MASK = 1
"""Bytes of an element of torch's dropout mask."""
DEFAULT_BUCKET = 500_000_000
"""Elements: DeepSpeed's own `reduce_bucket_size`, where its JSON says nothing."""


@dataclass(frozen=True)
class ModelShape:
    """What of a decoder model's shape decides its memory."""

    base_parameters: int
    layers: int
    hidden_size: int
    intermediate_size: int
    kv_size: int
    """Outputs of the key projection: key-value heads × head size."""
    vocab_size: int

    @classmethod
    def from_config(cls, config: Any, base_parameters: int) -> ModelShape:
        """From a transformers configuration, in the names that Llama-like models share.

        Where one is missing, the plain transformer's proportion stands in (4 · hidden, as many key-value
        heads as heads), so an unusual model gets a rougher estimate and no error.
        """
        hidden = _number(config, "hidden_size", 4096)
        heads = _number(config, "num_attention_heads", 1)
        head_size = _number(config, "head_dim", hidden // heads)
        kv_heads = _number(config, "num_key_value_heads", heads)
        return cls(
            base_parameters=base_parameters,
            layers=_number(config, "num_hidden_layers", 1),
            hidden_size=hidden,
            intermediate_size=_number(config, "intermediate_size", 4 * hidden),
            kv_size=kv_heads * head_size,
            vocab_size=_number(config, "vocab_size", 0),
        )


def _number(config: Any, name: str, otherwise: int) -> int:
    """A size of a configuration; of one that differs from layer to layer, the largest."""
    found = getattr(config, name, None)
    values = found if isinstance(found, (list, tuple)) else [found]
    return max((int(value) for value in values if isinstance(value, int)), default=0) or otherwise


@dataclass(frozen=True)
class MemorySetting:
    """How the run's state is laid out over processes and devices."""

    dtype: str
    processes: int
    stage: int = 0
    offload_optimizer: bool = False
    offload_param: bool = False
    gradient_checkpointing: bool = False
    optimizer_states: int = 3
    """Per-element states beside the master: both moments and the age; 5 with importance sensitivity."""
    loss_chunk: int | None = None
    """Tokens whose logits exist at once; None if all do."""
    fused_kernels: bool = False
    """Liger's norm and SwiGLU, which keep less."""
    compiled_layers: bool = False
    """Whole layers compiled, which keep least."""
    bucket: int | None = None
    """Elements of the buffer in which ZeRO reduces gradients; None: hidden size squared."""

    @classmethod
    def from_ds_config(
        cls, settings: Mapping[str, Any], dtype: str, processes: int, **others: Any
    ) -> MemorySetting:
        """With stage, offloading and buffers read from a DeepSpeed configuration, resolved or not."""
        bucket = lookup(settings, "zero_optimization.reduce_bucket_size")
        return cls(
            dtype=dtype,
            processes=processes,
            stage=int(lookup(settings, "zero_optimization.stage") or 0),
            offload_optimizer=lookup(settings, "zero_optimization.offload_optimizer.device") == "cpu",
            offload_param=lookup(settings, "zero_optimization.offload_param.device") == "cpu",
            bucket=None if bucket == "auto" else int(bucket or DEFAULT_BUCKET),
            **others,
        )

    def shared(self, size: float, from_stage: int) -> float:
        """Bytes of one process when ZeRO divides `size` from a stage on."""
        return size / self.processes if self.stage >= from_stage else size


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one process at its peak, by what they hold."""

    weights: float
    gathered: float
    """Whole layers that ZeRO-3 holds for a moment."""
    adapter: float
    """The adapter's weights and their gradients."""
    optimizer: float
    buckets: float
    """The buffer in which ZeRO reduces gradients."""
    activations: float
    logits: float
    host: float
    """What offloading moves to the host's memory; not part of the total."""
    states: float
    """Of the optimizer on the device, what its first update makes."""
    gradients: float
    """Of the adapter, its gradients once they are reduced."""

    @property
    def total(self) -> float:
        """Bytes on the device (on a machine without GPU: in memory)."""
        return sum(size for _, size in self.parts())

    def parts(self) -> Iterator[tuple[str, float]]:
        """What the total consists of, in words."""
        yield "frozen base", self.weights
        yield "gathered layers", self.gathered
        yield "adapter and its gradients", self.adapter
        yield "optimizer (masters and states)", self.optimizer
        yield "buffer of gradients", self.buckets
        yield "activations", self.activations
        yield "logits and loss", self.logits


def estimate_memory(
    shape: ModelShape,
    setting: MemorySetting,
    trainable: int,
    tokens: int,
    *,
    dropped_inputs: int = 0,
    frozen_base: bool = True,
) -> MemoryEstimate:
    """Estimate the peak of one process.

    Args:
        trainable: parameters of the adapter, or of the base.
        tokens: tokens of one micro-batch, padding included.
        dropped_inputs: the inputs of all adapted layers together, where each keeps a dropped copy and its mask
            (PEFT's dropout).
        frozen_base: False where the base's own weights are what is trained.
    """
    width = BYTES[setting.dtype]
    base = setting.shared(shape.base_parameters * width, from_stage=3) if frozen_base else 0.0
    gradients = setting.shared(trainable * width, from_stage=2)
    adapter = setting.shared(trainable * width, from_stage=3) + gradients
    # A plain fp32 optimizer updates the parameters themselves; every wrapper keeps masters of its own.
    masters = 0 if setting.stage == 0 and setting.dtype == "fp32" else 1
    states = setting.shared(trainable * MASTER * setting.optimizer_states, from_stage=1)
    optimizer = setting.shared(trainable * MASTER * masters, from_stage=1) + states
    return MemoryEstimate(
        weights=0.0 if setting.offload_param else base,
        gathered=_gathered(shape, width) if setting.stage == 3 else 0.0,
        adapter=adapter,
        optimizer=0.0 if setting.offload_optimizer else optimizer,
        buckets=_buckets(shape, setting),
        activations=_activations(shape, setting, tokens, dropped_inputs),
        logits=_logits(shape, setting, tokens),
        host=base * setting.offload_param + optimizer * setting.offload_optimizer,
        states=0.0 if setting.offload_optimizer else states,
        gradients=gradients,
    )


def layer_bytes_per_token(
    shape: ModelShape, dtype: str, *, fused_kernels: bool = False, compiled: bool = False
) -> int:
    """Bytes that one decoder layer with a frozen base and adapters keeps for the backward pass, for a token.

    Counted for Llama as transformers runs it. A frozen layer keeps nothing, an adapted one its input.

    | kept | elements |
    |---|---|
    | the residual stream at both norms, in fp32 whatever the dtype | 2 hidden |
    | what both norms give; the rotated queries; the attention's output | 4 hidden |
    | the rotated keys; the values | 2 keys |
    | gate; up; the activation; their product | 4 intermediate |

    Liger's norms keep the stream in the model's dtype, and its SwiGLU computes the activation again. A layer compiled
    whole also computes their product again, and what one norm gives (3.26 MB a token of the 8B shape: docs/gpu.md).
    """
    width = BYTES[dtype]
    if compiled:
        elements = 5 * shape.hidden_size + 2 * shape.kv_size + 2 * shape.intermediate_size
        return elements * width
    stream = 2 * shape.hidden_size * (width if fused_kernels else BYTES["fp32"])
    mlp = (3 if fused_kernels else 4) * shape.intermediate_size
    return stream + (4 * shape.hidden_size + 2 * shape.kv_size + mlp) * width


def _activations(shape: ModelShape, setting: MemorySetting, tokens: int, dropped_inputs: int) -> float:
    """With checkpointing the layers' inputs, and one layer at a time, after the logits are gone."""
    width = BYTES[setting.dtype]
    of_layer = layer_bytes_per_token(
        shape, setting.dtype, fused_kernels=setting.fused_kernels, compiled=setting.compiled_layers
    )
    layers = tokens * (shape.layers * of_layer + dropped_inputs * (width + MASK))
    if setting.gradient_checkpointing:
        one = layers / max(1, shape.layers)
        return tokens * shape.layers * shape.hidden_size * width + max(
            0.0, one - _logits(shape, setting, tokens)
        )
    return layers


def _logits(shape: ModelShape, setting: MemorySetting, tokens: int) -> float:
    """Of chunked logits, an fp32 copy and its exponentials; else the log-probabilities and two gradients, in fp32."""
    if setting.loss_chunk is None:
        return tokens * shape.vocab_size * 3 * BYTES["fp32"]
    return min(tokens, setting.loss_chunk) * shape.vocab_size * 2 * BYTES["fp32"]


def _buckets(shape: ModelShape, setting: MemorySetting) -> float:
    """Stage 1 sums in fp32."""
    if setting.stage == 0:
        return 0.0
    elements = shape.hidden_size**2 if setting.bucket is None else setting.bucket
    return elements * (MASTER if setting.stage == 1 else BYTES[setting.dtype])


def _gathered(shape: ModelShape, width: int) -> float:
    """Two layers (one computing, one prefetched) and the head."""
    head = shape.vocab_size * shape.hidden_size
    layer = max(0, shape.base_parameters - head) / max(1, shape.layers)
    return min(shape.base_parameters, 2 * layer + head) * width
