"""What the command does beside runs: plan is in forecast.py, the others each in a module here."""
