"""The pruning policy that evaluation and latency run under.

ODP, EES and static removal are fitted to calibration text on the model that is pruned. PESF has nothing to fit: its threshold
follows each sequence.
"""

from moepress.artefacts import Task, write_json
from moepress.schema.pruning import is_fitted

HEADERS_ONLY = ("model",)


def run(task: Task) -> None:
    pruning = task.config["pruning"]
    write_json(task.out / "policy.json", fitted(task, pruning) if is_fitted(pruning["method"]) else pruning)


def fitted(task: Task, pruning: dict) -> dict:
    # imported here, for torch takes seconds that PESF does not need
    from safetensors.torch import load_file
    from tqdm import tqdm

    from moepress.inference.checkpoint import load, pick_device
    from moepress.models.folders import locate
    from moepress.pruning.fitting import fit

    model, _ = load(locate(task.inputs["checkpoint"]), pick_device(task.runtime["device"]), verify=False)
    token_ids = load_file(task.inputs["calibration"] / "tokens.safetensors")["token_ids"]
    passes = 1 if pruning.get("threshold") is not None else 2
    with tqdm(total=passes * len(token_ids), desc=f"pruning {task.name}", unit="sequence", mininterval=1) as progress:
        return fit(model, token_ids, pruning, progress)
