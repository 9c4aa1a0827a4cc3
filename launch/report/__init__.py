"""The report of a run: `python -m launch.report RUN`."""
