"""The generated sample, and the facts it is generated from."""
