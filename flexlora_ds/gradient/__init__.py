"""Directions born from the gradient: the top singular pairs of ∂L/∂W of every matrix, without ever holding ∂L/∂W."""
