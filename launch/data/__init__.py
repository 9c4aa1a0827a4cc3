"""From records to micro-batches."""
