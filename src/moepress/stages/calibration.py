"""The calibration sample: token ids `[num_sequences, seq_len]` and where each sequence came from."""

import numpy as np
import pandas as pd
from safetensors.numpy import save_file

from moepress.artefacts import Task, read_json
from moepress.data import sampling
from moepress.models.folders import check_positions, locate

HEADERS_ONLY = ("model",)


def run(task: Task) -> None:
    config = task.config["calibration"]
    model = locate(task.inputs["model"])
    check_positions(read_json(model / "config.json"), "calibration.seq_len", config["seq_len"])
    found = sampling.domain_blocks(
        task.inputs["corpus"], model, "calibration", config["seq_len"], config["domains"], "calibration"
    )
    blocks = {domain: blocks for domain, (blocks, _) in found.items()}
    wanted = config["num_sequences"]
    if "at_most" in config:  # the sample for tuning the whole model
        wanted = sampling.available(blocks, config["at_most"])
    token_ids, origin = sampling.sample_calibration(blocks, wanted, config["seed"])
    save_file({"token_ids": np.ascontiguousarray(token_ids)}, task.out / "tokens.safetensors")
    pd.DataFrame(origin, columns=["domain", "block"]).to_parquet(task.out / "origin.parquet")
