"""What two models that no machine here holds will take, stage by stage, by `moepress plan`'s own arithmetic: docs/scale.md.

python benchmarks/scale.py [OVERRIDES...]

Time is in core-hours: floating-point operations over what one thread of this machine does in a CPU second.
"""

import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from large import write_index
from moepress import config, estimate, forecast, work
from moepress.models import outline
from moepress.quantization.budget import Prediction, unpacked_bytes
from moepress.wording import count, readable

MIXTRAL_8X22B = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 32768,
    "hidden_size": 6144,
    "intermediate_size": 16384,
    "num_hidden_layers": 56,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
PAPERS = ["calibration.num_sequences=128", "calibration.seq_len=2048", "evaluation=papers"]
"""Calibration and test text as the papers have them."""


def lines(name: str, model: outline.Outline, overrides: list[str], speed: float) -> list[str]:
    values = config.values([*PAPERS, *overrides]) | {"model": {"kind": "local"}}
    asked = forecast.asked_size(Prediction(model, values["quantization"]), values["allocation"])
    memory = estimate.memory(model, values, asked.on_cpu, "cpu", 512 << 30)
    seconds, disk = estimate.seconds(model, values, speed), estimate.disk(model, values, asked.folder)
    found = [f"{name}: {count(model.num_weights)} weights, {count(model.active_weights)} active, "]
    found[0] += (
        f"{readable(2 * model.num_weights)} at 16 bits, {readable(unpacked_bytes(model, 'cpu'))} in float32; {asked.label}"
    )
    del seconds["evaluation and latency"]
    for label, is_packed in (("evaluation at 16 bits", False), ("evaluation", True)):
        seconds[label], timed = (flops / speed for flops in work.measurement_flops(model, values, is_packed))
        seconds["latency"] = seconds.get("latency", 0) + timed
    found += [f"  {stage:22} {n / 3600:9.1f} core-hours  {readable(memory.get(stage, 0))}" for stage, n in seconds.items()]
    length = values["calibration"]["seq_len"]
    forward = work.forward_flops(model, values["calibration"]["num_sequences"] * length, length) / speed / 3600
    found += [f"  one forward of the calibration text {forward:.1f} core-hours"]
    return found + [f"  disk: {what} {readable(n)}" for what, n in disk.items()]


if __name__ == "__main__":
    speed = estimate.measured_flops(2.0, clock=time.process_time)
    print(f"{speed / 1e9:.0f} GFLOP/s in a CPU second")
    with tempfile.TemporaryDirectory() as place:
        v3 = outline.read_any(write_index(Path(place), float8=True), "model.path")
    for name, model in (("Mixtral-8x22B", outline.from_config(MIXTRAL_8X22B, "model")), ("DeepSeek-V3", v3)):
        print("\n".join(lines(name, model, sys.argv[1:], speed)), flush=True)
