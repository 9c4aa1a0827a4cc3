"""The adapted linear layer."""
