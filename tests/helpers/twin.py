"""FlexLoRA in plain torch, on one process, without DeepSpeed and without the library's own machinery.

Written from the method's formulas alone: its own layer, its own Adam (element by element ages), its own entropy, plan
and resize. Only the named generators of the random directions are shared, since both must draw the same vectors.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flexlora_ds.config import FlexLoRAConfig
from flexlora_ds.seeds import generator


class TwinLayer(nn.Module):
    def __init__(self, base: nn.Linear, p: Tensor, lam: Tensor, q: Tensor, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.t = {"P": p.clone(), "lam": lam.clone(), "Q": q.clone()}
        for v in self.t.values():
            v.requires_grad_(True)
        self.state = {k: {n: torch.zeros_like(v) for n in ("m", "v", "age")} for k, v in self.t.items()}

    def forward(self, x: Tensor) -> Tensor:
        update = self.t["P"] @ torch.diag(self.t["lam"]) @ self.t["Q"]
        return self.base(x) + self.scale * (x @ update.T)


def twin_of(model: nn.Module) -> dict[str, TwinLayer]:
    """Replace the library's layers in `model` by the twin's, with the same values."""
    from flexlora_ds import adapters

    layers = {}
    for name, layer in adapters(model).items():
        twin = TwinLayer(layer.base, layer.P.data, layer.lam.data, layer.Q.data, layer.scaling)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, twin)
        layers[name] = twin
    return layers


def entropy(lam: Tensor) -> float:
    e = np.asarray(lam.detach(), dtype=np.float64) ** 2
    s = e / e.sum()
    return float(-(s * np.log(s + 1e-8)).sum() / math.log(len(s)))


def train(
    model: nn.Module,
    config: FlexLoRAConfig,
    batches: list[list[list[int]]],
    due: dict[int, int],
    lr: float,
    total: int,
    eta: float,
) -> dict[str, Any]:
    """Losses, and ranks after every change. `due`: step -> the size of the change due there."""
    from tests.helpers.tiny import targets, token_loss

    layers = twin_of(model)
    losses, ranks = [], []
    for step, rows in enumerate(batches, 1):
        factor = min(step / 5, max(0.0, 1 - (step - 1) / total))
        loss = token_loss(model, rows) / targets(rows)
        loss.backward()
        _adam(layers, lr, factor)
        following = min((step + 1) / 5, max(0.0, 1 - step / total))
        _orthogonalise(layers, eta * following)
        losses.append(loss.item())
        if step in due:
            _change(layers, config, step, due[step])
            ranks.append({n: len(layer.t["lam"]) for n, layer in layers.items()})
    return {"losses": losses, "ranks": ranks}


@torch.no_grad()
def _adam(layers: dict[str, TwinLayer], lr: float, factor: float) -> None:
    grads = [v.grad for layer in layers.values() for v in layer.t.values()]
    norm = torch.sqrt(sum((g**2).sum() for g in grads))
    clip = min(1.0, 1.0 / (float(norm) + 1e-6))
    for layer in layers.values():
        for key, w in layer.t.items():
            g, s = w.grad * clip, layer.state[key]
            rate = lr * factor * (math.sqrt(min(layer.base.weight.shape)) if key == "lam" else 1.0)
            s["age"] += 1
            s["m"] = 0.9 * s["m"] + 0.1 * g
            s["v"] = 0.999 * s["v"] + 0.001 * g**2
            age = s["age"].double()  # 1 − 0.999 has lost four digits in fp32
            step = s["m"] / (1 - 0.9**age).to(w) / ((s["v"] / (1 - 0.999**age).to(w)).sqrt() + 1e-8)
            w -= rate * step
            w.grad = None


@torch.no_grad()
def _orthogonalise(layers: dict[str, TwinLayer], eta: float) -> None:
    for layer in layers.values():
        p, q = layer.t["P"], layer.t["Q"]
        eye = torch.eye(p.shape[1])
        p -= eta * p @ (p.T @ p - eye)
        q -= eta * (q @ q.T - eye) @ q


@torch.no_grad()
def _change(layers: dict[str, TwinLayer], config: FlexLoRAConfig, step: int, size: int) -> None:
    names = list(layers)
    scores = {n: entropy(layers[n].t["lam"]) for n in names if len(layers[n].t["lam"]) > 1}
    median = float(np.median(list(scores.values())))
    scores = {n: scores.get(n, median) for n in names}
    order = sorted(names, key=lambda n: (scores[n], names.index(n)))
    low = [n for n in order if len(layers[n].t["lam"]) > 1]
    high = [n for n in reversed(order) if len(layers[n].t["lam"]) < 4 * config.rank]
    k = size
    while set(low[:k]) & set(high[:k]) or (k and scores[low[k - 1]] > scores[high[k - 1]]):
        k -= 1
    for n in low[:k]:
        _resize(layers[n], n, config, step, drop=int(layers[n].t["lam"].abs().argmin()), add=False)
    for n in high[:k]:
        _resize(layers[n], n, config, step, drop=None, add=True)


def _resize(
    layer: TwinLayer, name: str, config: FlexLoRAConfig, step: int, drop: int | None, add: bool
) -> None:
    out, features = layer.base.weight.shape
    keep = [i for i in range(len(layer.t["lam"])) if i != drop]
    new = {
        "P": torch.randn(1, out, generator=generator(config.seed, "direction", step, name, "P")).T
        / math.sqrt(out),
        "lam": torch.zeros(1),
        "Q": torch.randn(1, features, generator=generator(config.seed, "direction", step, name, "Q"))
        / math.sqrt(features),
    }
    for key, axis in (("P", 1), ("lam", 0), ("Q", 0)):

        def edit(t: Tensor, extra: Tensor, axis: int = axis) -> Tensor:
            kept = t.index_select(axis, torch.tensor(keep))
            return torch.cat([kept, extra], axis) if add else kept

        layer.t[key] = edit(layer.t[key].detach(), new[key]).requires_grad_(True)
        layer.state[key] = {n: edit(v, torch.zeros_like(new[key])) for n, v in layer.state[key].items()}
