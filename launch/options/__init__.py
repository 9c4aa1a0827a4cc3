"""What a run is asked: its keys, where values come from, help texts."""
