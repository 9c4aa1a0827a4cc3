"""Short runs of named settings over seeds, side by side: what they learn, and by how much they differ."""
