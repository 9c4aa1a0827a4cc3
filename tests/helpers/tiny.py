"""A tiny Llama, records of unequal length, and an engine around them: what the tests under DeepSpeed share."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from flexlora_ds import FlexLoRAConfig, adapters, inject_adapters

VOCABULARY = 96
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def tiny_llama(dtype: str = "fp32", seed: int = 0, hidden: int = 32, layers: int = 2) -> nn.Module:
    """A randomly initialised LlamaForCausalLM with grouped key-value heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        use_cache=False,
        attn_implementation="eager",
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).to(DTYPES[dtype])


def adapted_llama(config: FlexLoRAConfig, dtype: str = "fp32", **kwargs: Any) -> nn.Module:
    """The tiny Llama with adapters whose λ is already non-zero, so that every gradient flows."""
    model = tiny_llama(dtype, **kwargs)
    inject_adapters(model, config)
    rng = torch.Generator().manual_seed(5)
    for layer in adapters(model).values():
        layer.lam.data.copy_(0.3 * torch.randn(layer.rank, generator=rng))
    return model


def records(count: int, seed: int = 7) -> list[list[int]]:
    """A small learnable corpus: token lists of unequal length (5 to 16)."""
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 17, (count,), generator=rng).tolist()
    return [torch.randint(1, VOCABULARY, (n,), generator=rng).tolist() for n in lengths]


def global_batch(step: int, size: int, corpus: list[list[int]], seed: int = 3) -> list[list[int]]:
    """The records of one step, whatever the number of processes."""
    rng = torch.Generator().manual_seed(seed * 100_003 + step)
    return [corpus[i] for i in torch.randint(0, len(corpus), (size,), generator=rng).tolist()]


def collate(rows: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """(input_ids, attention_mask, labels), right-padded; labels are −100 on padding."""
    width = max(len(r) for r in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return ids, mask, ids.masked_fill(mask == 0, -100)


def targets(rows: list[list[int]]) -> int:
    """Number of predicted tokens: the first of a record is never a target."""
    return sum(len(r) - 1 for r in rows)


def token_loss(model: Any, rows: list[list[int]]) -> Tensor:
    """Sum of the token losses of some records, in fp32."""
    ids, mask, labels = collate(rows)
    device = next(model.parameters()).device
    logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits.float()
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1).to(device), reduction="sum"
    )


def ds_config(
    stage: int, dtype: str = "fp32", world: int = 1, gas: int = 1, batch: int = 8, **zero: Any
) -> dict[str, Any]:
    """A DeepSpeed configuration with small buckets, so that a tiny model exercises several."""
    config: dict[str, Any] = {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": batch // (world * gas),
        "gradient_accumulation_steps": gas,
        "steps_per_print": 10**9,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 20000,
            "allgather_bucket_size": 20000,
            "stage3_prefetch_bucket_size": 2000,
            "stage3_param_persistence_threshold": 100,
            **zero,
        },
    }
    if dtype == "bf16":
        config["bf16"] = {"enabled": True}
    if dtype == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 6, "hysteresis": 1}
    return config


def start() -> tuple[int, int]:
    """Initialise communication once per process; (rank, world size)."""
    import logging

    import deepspeed
    from deepspeed import comm

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(backend, verbose=False)
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    return comm.get_rank(), comm.get_world_size()


def make_engine(
    model: nn.Module, config: FlexLoRAConfig, ds: dict[str, Any], lr: float = 5e-3, total: int = 200
) -> Any:
    """`deepspeed.initialize` with our optimizer, our groups and a warm-up then linear schedule."""
    import deepspeed
    from torch.optim.lr_scheduler import LambdaLR

    from flexlora_ds import build_optimizer

    optimizer = build_optimizer(model, config, lr)
    scheduler = LambdaLR(optimizer, lambda k: min((k + 1) / 5, max(0.0, 1 - k / total)))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=scheduler, config=ds)
    return engine


def make_torch_engine(
    model: nn.Module, config: FlexLoRAConfig, ds: dict[str, Any], lr: float = 5e-3, total: int = 200
) -> Any:
    """The same training in plain torch: on one process alone, in several under DistributedDataParallel."""
    from deepspeed import comm
    from torch.optim.lr_scheduler import LambdaLR

    from flexlora_ds import TorchEngine, build_optimizer

    optimizer = build_optimizer(model, config, lr)
    return TorchEngine(
        nn.parallel.DistributedDataParallel(model) if comm.get_world_size() > 1 else model,
        optimizer,
        lr_scheduler=LambdaLR(optimizer, lambda k: min((k + 1) / 5, max(0.0, 1 - k / total))),
        accumulation_steps=ds["gradient_accumulation_steps"],
        max_grad_norm=ds["gradient_clipping"],
    )


def train_step(engine: Any, rows: list[list[int]]) -> float:
    """One global step over `rows`; the loss per target token of the whole global batch, summed over processes."""
    from deepspeed import comm

    rank, world = comm.get_rank(), comm.get_world_size()
    gas = engine.gradient_accumulation_steps()
    micro = len(rows) // (world * gas)
    tokens = targets(rows)
    total = torch.zeros(1, dtype=torch.float64, device=engine.device)
    for j in range(gas):
        begin = (j * world + rank) * micro
        loss = token_loss(engine, rows[begin : begin + micro])
        engine.backward(loss * (world * gas / tokens))
        engine.step()
        total += loss.detach().double()
    comm.all_reduce(total)
    return float(total) / tokens
