"""Documents by domain, split into train / calibration / test."""

from pathlib import Path

from moepress.artefacts import Task
from moepress.data import corpus


def run(task: Task) -> None:
    config = task.config["corpus"]
    if task.runtime["corpus_path"]:
        config = {**config, "path": task.runtime["corpus_path"]}
    corpus.build(config, task.out, Path(task.runtime["cache"]))
