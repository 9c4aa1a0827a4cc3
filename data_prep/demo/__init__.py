"""The generated sample, and the world behind it."""
