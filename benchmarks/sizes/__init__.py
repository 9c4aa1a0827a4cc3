"""One trained adapter at several sizes: truncated, beside runs trained at those sizes and beside a truncated LoRA."""
