"""moepress: Mixture-of-Experts language models made small and fast, with the proof of what it cost.

After `import moepress`, before or after transformers, `AutoModelForCausalLM.from_pretrained` loads what moepress wrote.
"""

import wrapt

__version__ = "0.1.0"


@wrapt.when_imported("transformers.quantizers.auto")
def _register(_) -> None:
    """Teach transformers the packed format as soon as it is imported; importing it here would cost every stage seconds."""
    import moepress.inference.quantizer  # noqa: F401


def load(folder, device="auto", dtype=None, pruning=None, verify=True):
    """Load a checkpoint that moepress wrote, or any model of a family it knows; see `moepress.inference.checkpoint.load`."""
    from moepress.inference.checkpoint import load as load_checkpoint

    return load_checkpoint(folder, device=device, dtype=dtype, pruning=pruning, verify=verify)


def compress(model, out=None, budget=None, **overrides):
    """Compress a model as the command does; see `moepress.api.compress`."""
    from moepress.api import compress as run

    return run(model, out=out, budget=budget, **overrides)
