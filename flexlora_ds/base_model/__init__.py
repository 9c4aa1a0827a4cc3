"""The base model: found, loaded, told apart from another."""
