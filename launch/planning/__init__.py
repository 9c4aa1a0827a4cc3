"""What is settled before the first weight is loaded."""
