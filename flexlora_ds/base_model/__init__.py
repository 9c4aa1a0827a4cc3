"""The base model: found, loaded, recognised."""
