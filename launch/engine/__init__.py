"""DeepSpeed: its JSON, what is refused, the methods, the engine."""
