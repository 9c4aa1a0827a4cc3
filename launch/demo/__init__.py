"""The demos: `make demo`, `make demo-smollm2`."""
