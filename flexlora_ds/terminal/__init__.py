"""What a command says at a terminal: how it ends, counted words, text that is no markup, a progress bar. No torch."""
