"""Bits for every expert of every layer within the budget, and the solver's certificate."""

from dataclasses import asdict

from moepress import allocation
from moepress.artefacts import Task, read_json, write_json
from moepress.models import families
from moepress.models.families import locate, read_shape
from moepress.quantization import size


def run(task: Task) -> None:
    config, quantization = task.config["allocation"], task.config["quantization"]
    group_size = quantization["group_size"]
    folder = locate(task.inputs["model"])
    shape = read_shape(folder, "model")
    tensors = families.tensors(folder)
    outside = size.bytes_outside_experts(shape, tensors, quantization)
    sizes, total = size.plan_budget(config, shape, tensors, quantization)

    if config["method"] == "uniform":
        num_experts = len(shape.moe_layers) * shape.num_experts
        fitting = [width for width, one in sizes.items() if one * num_experts <= total]
        bits, solutions = [[max(fitting)] * shape.num_experts for _ in shape.moe_layers], []
    else:
        statistics = read_json(task.inputs["statistics"] / "statistics.json")
        one_each = [sizes[width] for width in config["widths"]]
        solutions = allocation.pmq(statistics["layers"], config, statistics["widths"], one_each, total)
        bits = [solution.bits for solution in solutions]

    used = [width for layer in bits for width in layer]
    predicted = outside + sum(size.expert_bytes(shape, width, group_size) for width in used)
    write_json(
        task.out / "allocation.json",
        {
            "layers": list(shape.moe_layers),
            "bits": bits,
            "mean_bits": sum(used) / len(used),
            "predicted_bytes": predicted,
            "predicted_bits_effective": 8 * predicted / size.num_weights(tensors),
            "solver": [{k: v for k, v in asdict(s).items() if k not in ("bits", "seconds")} for s in solutions],
        },
    )
