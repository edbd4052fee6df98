"""moepress: Mixture-of-Experts language models made small and fast, with the proof of what it cost."""

__version__ = "0.1.0"


def load(folder, device="auto", dtype=None, pruning=None):
    """Load a checkpoint that moepress wrote, or any model of a family it knows; see `moepress.inference.load`."""
    from moepress.inference.checkpoint import load as load_checkpoint

    return load_checkpoint(folder, device=device, dtype=dtype, pruning=pruning)


def compress(model, out=None, budget=None, **overrides):
    """Compress a model as the command does; see `moepress.api.compress`."""
    from moepress.api import compress as run

    return run(model, out=out, budget=budget, **overrides)
