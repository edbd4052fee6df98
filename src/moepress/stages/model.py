"""The model: the trained small one, a dense one that is carved, or a checked reference to a folder or a hub model."""

from pathlib import Path

from moepress.artefacts import Task, write_json
from moepress.models import hub
from moepress.models.files import record

WORK = ("training_state.safetensors", "recovery_state.safetensors", "carving")


def run(task: Task) -> None:
    config = task.config["model"]
    if config["kind"] == "tiny":
        from moepress.models import tiny

        tiny.train(config, task.inputs["corpus"] / "documents.parquet", task.out)
        return
    if config["kind"] == "carved":
        from moepress.inference.checkpoint import pick_device
        from moepress.models import carved, dense

        source = dense.find(config, task.runtime["model_path"], Path(task.runtime["cache"]))
        carved.carve(config, task.inputs["corpus"], source, task.out, pick_device(task.runtime["device"]))
        return
    if config["kind"] == "hub":
        folder = hub.download(config["id"], config["revision"])
    else:
        folder = Path(task.runtime["model_path"]).resolve()
    refer(folder, task.out)


def refer(folder: Path, out: Path) -> None:
    """Write `reference.json`: where the model is and the hash of each of its files; every weight is read and checked once."""
    from tqdm import tqdm

    from moepress.models.streaming import ModelStream

    stream = ModelStream(folder)
    for _ in tqdm(stream.check(), total=stream.shape.num_layers, desc="checking weights", unit="layer", mininterval=1):
        pass
    hashes = {}
    for path in tqdm(sorted(p for p in folder.iterdir() if p.is_file()), desc="hashing", unit="file", mininterval=1):
        hashes[path.name] = record(path)["sha256"]
    dtype = str(stream.storage_dtype).removeprefix("torch.")
    write_json(out / "reference.json", {"path": str(folder), "family": stream.shape.family, "dtype": dtype, "files": hashes})
