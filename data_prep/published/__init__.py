"""What LLM-Adapters published, and how a built file compares with it."""
