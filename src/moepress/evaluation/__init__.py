"""What compression cost: perplexity and selection shift."""
