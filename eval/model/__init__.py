"""The model that is evaluated."""
