"""How much is computed at once, for the code that computes it and for the plan that foretells it: imports no torch.

Legend: H hidden size, I intermediate size, E experts.
"""

TOKENS_AT_ONCE = 4096
"""Tokens in one forward of a layer: bounds the activations beside the stored streams."""

WORKSPACE = 2 << 30
"""Bytes that the curvatures of one batch of experts may take; a single expert may need more."""


def curvature_bytes(width: int) -> int:
    """Of a float32 curvature `[width, width]` with its factor and their work."""
    return 6 * 4 * width**2


def experts_at_once(H: int, I: int, E: int) -> int:
    """How many of a layer's E experts go together: as many as the workspace holds."""
    return max(1, min(E, WORKSPACE // curvature_bytes(max(H, I))))
