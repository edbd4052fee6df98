"""Text: the corpus by domain and the sampling of calibration sequences."""
