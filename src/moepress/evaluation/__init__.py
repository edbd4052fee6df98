"""What compression costs: perplexity, selection shift, scores of tasks; what the shifted selections cost alone."""
