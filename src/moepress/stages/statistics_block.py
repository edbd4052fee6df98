"""The statistics of one block of layers: `statistics.blocks` jobs side by side instead of one."""

from moepress.artefacts import Task
from moepress.stages.statistics import WORK, measure

__all__ = ["WORK", "run"]


def run(task: Task) -> None:
    measure(task, *task.config["statistics"]["block"])
