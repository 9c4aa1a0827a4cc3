"""What is in a data folder: `python -m data_prep.report`."""
