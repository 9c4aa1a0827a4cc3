"""The standalone evaluation harness: `python -m eval --model M [--adapter DIR]`. Needs no DeepSpeed."""
