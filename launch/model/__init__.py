"""How the base model computes: attention, fused kernels, compiled pieces, the loss."""
