"""Bits for every expert of every layer within the budget, and the solver's certificate."""

from dataclasses import asdict

from moepress import allocation
from moepress.artefacts import Task, read_json, write_json
from moepress.models import outline
from moepress.models.folders import locate
from moepress.quantization.budget import Prediction, plan_budget

HEADERS_ONLY = ("model",)


def run(task: Task) -> None:
    config = task.config["allocation"]
    model = outline.read(locate(task.inputs["model"]), "model")
    shape = model.shape
    prediction = Prediction(model, task.config["quantization"])
    sizes, total = plan_budget(config, prediction)

    statistics = read_json(task.inputs["statistics"] / "statistics.json") if "statistics" in task.inputs else None
    bits, solutions = allocation.allocate(config, len(shape.moe_layers), shape.num_experts, sizes, total, statistics)

    used = [width for layer in bits for width in layer]
    predicted = prediction.weight_bytes(bits)
    write_json(
        task.out / "allocation.json",
        {
            "layers": list(shape.moe_layers),
            "bits": bits,
            "mean_bits": sum(used) / len(used),
            "predicted_bytes": predicted,
            "predicted_bits_effective": 8 * predicted / model.num_weights,
            "predicted_folder_bytes": prediction.folder_bytes(bits),
            "predicted_loaded_bytes": {device: prediction.loaded_bytes(bits, device) for device in ("cpu", "cuda")},
            "solver": [{k: v for k, v in asdict(s).items() if k != "bits"} for s in solutions],
        },
    )
