"""Several evaluations side by side: `python -m eval.compare DIR DIR …`."""
