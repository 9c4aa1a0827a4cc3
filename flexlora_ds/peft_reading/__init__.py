"""Adapters in PEFT's format read: what their configuration may say, a plain LoRA as tensors, any kind through PEFT."""
