"""What int8 costs: perplexity, agreement, error of layers, for our runtime and other methods."""
