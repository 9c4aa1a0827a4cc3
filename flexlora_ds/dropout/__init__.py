"""Dropout whose masks are a hash, and the kernels that apply them."""
