"""Grids, error feedback, router calibration, the layer loop and the packed format."""
