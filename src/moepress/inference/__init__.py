"""Running packed checkpoints: the modules, their registration with transformers, loading."""
