"""What holds, and how fast, on the GPU that is there: `python -m benchmarks.gpu`."""
