"""What lives from the first step to the last."""
