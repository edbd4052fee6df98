"""runs.csv: one row per run. Means over several domains give every domain the same weight.

Standard errors are over blocks of text, domain by domain: they say what another draw of test text would change, not
what another calibration sample would. Errors of a difference (`delta_*`) are paired, block by block, so they are much
smaller than those of the perplexities themselves.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from moepress.integrity import PROVENANCE
from moepress.report import decomposition, paired
from moepress.report.reading import reference_of
from moepress.report.run import Run, compact_json

TIMES = ("prefill_ms", "decode_ms", "prefill_ms_16bit", "decode_ms_16bit")


def tabulate(runs: list[Run]) -> pd.DataFrame:
    """One row per run. Beside the columns whose names say it:

    bits_nominal: mean width of the expert weights. bits_effective: bytes on disk x 8 / number of weights.
    checkpoint_bytes, folder_bytes, loaded_bytes: see `Run.sizes`; predicted_*: the same before the run.
    activated_experts: routed experts computed per token. remaining_experts: of a layer, after static removal. protected_tokens:
    share of the tokens that keep all their experts under ODP. ppl_mean: geometric mean of the perplexities of the domains
    that the corpus has training or calibration text of; ppl_ood: of the others. delta_nll: mean increase over the
    16-bit model in nats per token on the same blocks, over the domains of ppl_mean (so exp(delta_nll) is the ratio of
    the two ppl_mean); delta_nll_ood: over those of ppl_ood. delta_nll_shift_only, delta_nll_weights_only: of the 16-bit
    model with this one's selections, and of this one with the 16-bit model's. divergence: of its predictions from the 16-bit
    model's, KL(p || p_hat) in nats per token, over the domains of ppl_mean; same_choice: share of tokens after which both think
    the same next one most likely; *_ood: over the domains of ppl_ood. bpb_<domain>: bits per byte of text.
    acc_mean: mean accuracy over the run's tasks; delta_acc: what it is above the 16-bit model's, item by item; limit: only
    so many items of each task were asked. selection_shift: share of selected slots that changed.
    prefill_ms, decode_ms (of a step): at the first setting of latency.*; *_ms_16bit: of the 16-bit model in the same process,
    which speedup_* is against; share_*: what the device would need at the least for
    it, over the time that was taken. inference_bytes: the most memory of the timed prefills (on a CPU weights and key-value
    cache).
    """
    found = pd.DataFrame([row(run, reference_of(run, runs)) for run in runs])
    if all(run.decomposition is None for run in runs):
        found = found.drop(columns=list(decomposition.columns(runs[0], None)))
    if all(run.divergence is None for run in runs):
        found = found.drop(columns=list(divergences(runs[0])))
    return found


def row(run: Run, reference: Run | None) -> dict:
    quantized = run.is_quantized
    found = {
        "run": run.name,
        "model": Path(run.artefacts["model"]).name.rpartition("-")[0],
        "method": run.method,
        "allocation": run.allocation["method"] if quantized else "none",
        "bits_nominal": float(np.mean([width for layer in run.bits for width in layer])) if quantized else 16.0,
        "bits_effective": 8 * run.checkpoint_bytes / run.num_weights,
        **run.sizes,
        "pruning": run.pruning_label.lower().replace(" ", "-") or "none",
        "activated_experts": run.shape.top_k * run.metrics["active_slots"],
        "remaining_experts": run.remaining_experts,
        "protected_tokens": run.metrics.get("protected_tokens", 0.0),
    }
    for domain, measured in run.metrics["domains"].items():
        found[f"ppl_{domain}"] = measured["ppl"]
        found[f"ppl_{domain}_stderr"] = measured["ppl_stderr"]
        found[f"bpb_{domain}"] = measured["bits_per_byte"]
    inside, outside = run.domains
    for name, domains in (("mean", inside), ("ood", outside)):
        nll, error = mean_over_domains(run.blocks, domains)
        found[f"ppl_{name}"], found[f"ppl_{name}_stderr"] = np.exp(nll), np.exp(nll) * error
    for name, domains in (("delta_nll", inside), ("delta_nll_ood", outside)):
        above = paired.increase([run], [reference], domains) if reference else paired.NOTHING
        found[name], found[f"{name}_stderr"] = above.value, above.stderr
    found |= decomposition.columns(run, reference)
    found |= divergences(run)
    found |= accuracies(run)
    if reference and run.task_scores and (tasks := paired.accurate([run, reference])):
        above = paired.difference([run], [reference], paired.scores(tasks))
        found |= {"delta_acc": above.value, "delta_acc_stderr": above.stderr}
    provenance = run.json("quantization", PROVENANCE) if quantized else {}
    return found | {
        "selection_shift": run.metrics["selection_shift"],
        "selection_shift_stderr": run.metrics["selection_shift_stderr"],
        "quantize_seconds": run.json("quantization", "timing.json")["quantize_seconds"] if quantized else np.nan,
        "peak_memory_bytes": provenance.get("peak_memory_bytes", np.nan),
        **{name: (run.latency[name] or {}).get("median", np.nan) for name in TIMES},
        **{
            name: run.latency[name] or np.nan for name in ("speedup_prefill", "speedup_decode", "share_prefill", "share_decode")
        },
        "inference_bytes": max((row["memory_bytes"] for row in run.timed if row["phase"] == "prefill"), default=np.nan),
        "device": run.latency["device"],
        "timed_with": timed_with(run),
        "seed": run.seed,
        "keys": compact_json(run.keys),
    }


def divergences(run: Run) -> dict[str, float]:
    """Columns of how far its predictions are from the 16-bit model's; nan for a run that was not held against it."""
    found: dict[str, float] = {}
    for metric in ("divergence", "same_choice"):
        for name, domains in zip((metric, f"{metric}_ood"), run.domains, strict=True):
            known = run.divergence is not None
            value, error = mean_over_domains(run.divergence, domains, metric) if known else (np.nan, np.nan)
            found |= {name: value, f"{name}_stderr": error}
    return found


def timed_with(run: Run) -> str | None:
    """`2 threads, float32, torch 2.13.0`; None where nothing was timed."""
    found = run.latency
    if not found["device"]:
        return None
    threads = f"{found['threads']} thread{'s' if found['threads'] > 1 else ''}"
    libraries = [f"{name} {found['versions'][name]}" for name in ("torch", "triton", "numba") if name in found["versions"]]
    return ", ".join(filter(None, [threads, found["dtype"], *libraries]))


def accuracies(run: Run) -> dict:
    """Columns of the tasks' scores (`acc_<task>`; `<metric>_<task>` of what is no accuracy) with their standard errors."""
    found: dict[str, float] = {}
    accurate = []
    for task, score in run.task_scores.items():
        metric = score["metric"].split(",")[0]
        value, error = (np.nan if number is None else number for number in (score["value"], score["stderr"]))
        name = f"{'acc' if is_share(metric) else metric}_{task}"
        found |= {name: value, f"{name}_stderr": error}
        accurate += [(value, error)] if metric.startswith("acc") else []
    if accurate:
        values, errors = np.array(accurate).T
        found |= {"acc_mean": values.mean(), "acc_mean_stderr": np.sqrt((errors**2).sum()) / len(errors)}
    return found | ({"limit": run.limit or np.nan} if run.task_scores else {})


def is_share(metric: str) -> bool:
    """Whether a task's metric is a share of its items."""
    return metric.startswith(("acc", "exact_match", "pass"))


def mean_over_domains(blocks: pd.DataFrame, domains: list[str], metric: str = "nll") -> tuple[float, float]:
    """Mean of a metric over blocks, then over domains, and its standard error over blocks within domains.

    blocks: columns domain and the metric. (nan, nan) without domains; the error is nan where a domain has one block only.
    """
    if not domains:
        return np.nan, np.nan
    groups = blocks[blocks["domain"].isin(domains)].groupby("domain")[metric]
    return float(groups.mean().mean()), float(np.sqrt(groups.sem(ddof=1).pow(2).sum(skipna=False)) / len(domains))
