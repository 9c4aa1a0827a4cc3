"""How items get their answers."""
