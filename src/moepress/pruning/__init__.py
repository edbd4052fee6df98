"""Leaving experts out: functions from one routing to another, and attaching them to a model. Imports no torch."""


def num_removed(ratio: float, num_experts: int, top_k: int) -> int:
    """Experts of a layer that a static removal takes: `ratio` of them, rounded down.

    Raises ValueError where fewer than top-k would remain.
    """
    removed = int(ratio * num_experts + 1e-9)
    if num_experts - removed < top_k:
        most = (num_experts - top_k) / num_experts
        raise ValueError(f"pruning.ratio={ratio}: of {num_experts} experts {top_k} must remain; at most {most:g}")
    return removed


def label(pruning: dict) -> str:
    """A group `pruning` as people write it, every value in it: `PESF 0.3`, `ODP median 2%`, `static REAP 0.25`; none: ''."""
    method = pruning["method"]
    if method == "none":
        return ""
    if method == "static":
        criterion = pruning["criterion"]
        return f"static {criterion.upper() if criterion == 'reap' else criterion} {pruning['ratio']:g}"
    if method == "pesf":
        words = f"PESF {pruning['alpha']:g}"
    elif method in ("odp", "ees"):
        quantile = "median" if pruning["quantile"] == 0.5 else f"q{pruning['quantile']:g}"
        words = f"{method.upper()} {quantile if pruning['threshold'] is None else format(pruning['threshold'], 'g')}"
        words += f" {100 * pruning['protect']:g}%" if method == "odp" else ""
    else:
        words = " ".join([method, *(str(value) for key, value in pruning.items() if key not in ("method", "renormalize"))])
    return words if pruning.get("renormalize", True) else f"{words} raw"
