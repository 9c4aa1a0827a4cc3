"""What the runs are compared in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """How a run begins, and what it trains with."""

    lora: bool = False
    """λ stays 1 and P starts at 0: plain LoRA, with P as its B and Q as its A."""
    gradient: str = ""
    """Which of P and Q come from the gradient: PQ, P, Q, or neither."""
    unseen: bool = False
    """The gradient is that of batches that are never trained on."""
    lr: float = 1e-3
    beta2: float = 0.999


SETTINGS = {
    "LoRA": Setting(lora=True),
    "LoRA, gradient": Setting(lora=True, gradient="Q"),
    "gaussian": Setting(),
    "gradient": Setting(gradient="PQ"),
    "gradient P": Setting(gradient="P"),
    "gradient Q": Setting(gradient="Q"),
    "gradient, unseen": Setting(gradient="PQ", unseen=True),
    "gaussian, beta2 0.95": Setting(beta2=0.95),
    "gradient, beta2 0.95": Setting(gradient="PQ", beta2=0.95),
    "gaussian, lr 2e-3": Setting(lr=2e-3),
    "gradient, lr 2e-3": Setting(gradient="PQ", lr=2e-3),
}
USUAL = ("LoRA", "LoRA, gradient", "gaussian", "gradient")
REFERENCE = "gaussian"
"""What every other setting is compared with, seed by seed."""
