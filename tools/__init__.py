"""What keeps the project's texts in order; nothing here is needed to train or to evaluate."""
