"""What the command does beside runs, a module each."""
