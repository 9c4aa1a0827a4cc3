"""FlexLoRA in other people's trainers."""
