"""How the method learns to classify sentences: a pretrained encoder under a new head."""
