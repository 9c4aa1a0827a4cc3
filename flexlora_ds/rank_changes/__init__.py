"""One rank change: what is read of the matrices, what is decided, what is recorded, what is warned of."""
