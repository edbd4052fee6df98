"""The pruning policy that evaluation and latency run under. PESF has nothing to fit: its threshold follows each sequence."""

from moepress.artefacts import Task, write_json


def run(task: Task) -> None:
    write_json(task.out / "policy.json", task.config["pruning"])
