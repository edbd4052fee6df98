"""A sweep through a real Slurm: two nodes, one of which dies in the middle of a job. `make cluster-test`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import small_experiment
from moepress.artefacts import read_json

sys.path.insert(0, str(Path(__file__).parent))
import slurm

ALONE = {"provenance.json", "timing.json", ".snakemake_timestamp"}
"""When and where, of no two runs the same."""


@pytest.mark.cluster
def test_a_sweep_on_two_nodes_one_of_which_dies(tmp_path, model_folder, text_folder):
    """The same keys and bytes as on this machine alone; both nodes work; the death costs one job, which runs once more."""
    pytest.importorskip(
        "snakemake_executor_plugin_slurm", reason="no snakemake-executor-plugin-slurm: pip install '.[cluster]'"
    )
    if lack := slurm.missing():
        pytest.skip(lack)
    sweep = ["--multirun", *small_experiment(model_folder, text_folder), "latency.repeats=0", "device=cpu"]
    sweep += ["allocation=uniform", "allocation.bits=3", "quantization=gptq,qesc"]
    arguments = "[--slurm-init-seconds-before-status-checks,2,--slurm-status-command,squeue,--slurm-keep-successful-logs,"
    arguments += "--set-resources,'calibration:gpu=1']"
    on_cluster = ["hydra.launcher.profile=slurm", "hydra.launcher.cores=1", f"hydra.launcher.arguments={arguments}"]
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    command = [sys.executable, "-m", "moepress", *sweep]
    subprocess.run(command, cwd=here, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True)

    with slurm.Cluster(tmp_path / "slurm") as cluster, (tmp_path / "log").open("w") as log:
        running = subprocess.Popen([*command, *on_cluster], cwd=there, env=cluster.env, stdout=log, stderr=log)
        try:
            is_quantizing = lambda: list(there.glob("results/quantization/gptq*.partial"))  # noqa: E731
            cluster.wait_for(lambda: is_quantizing() or running.poll() is not None, "a quantization", 1800)
            (victim,) = [line.split() for line in cluster.running() if "gptq" in line]
            cluster.kill_node(victim[1])
            cluster.wait_for(lambda: cluster.states().get(victim[1], "").startswith("down"), "the controller's notice", 300)
            cluster.start_node(victim[1])
            assert running.wait(2400) == 0, (tmp_path / "log").read_text()
        finally:
            running.kill()
        jobs, endings = cluster.jobs(), cluster.endings()

    assert same_files(here, there) > 20
    # Slurm may cancel the step of a job that it queued again, for the dead one has the same number: Snakemake submits anew.
    failed = {job["JobId"] for job in jobs if job["JobState"] != "COMPLETED"}
    assert failed <= {victim[0]}
    assert len(jobs) - len(failed) == len(list(there.glob("results/*/*/provenance.json"))), "every artefact was one job"
    again = {job["JobId"]: int(job["Restarts"]) for job in jobs if job["Restarts"] != "0"}
    assert again == {victim[0]: 1}, "the death cost one job, which Slurm queued again"
    lost = [(job["JobId"], job["NodeList"], job["JobState"]) for job in endings if job["JobState"] != "COMPLETED"]
    assert lost[0] == (*victim[:2], "NODE_FAIL") and {job for job, _, _ in lost[1:]} == failed
    members = [
        job["NodeList"]
        for job in endings
        if any(job["JobId"] == j["JobId"] and "rule_quantization" in j["Comment"] for j in jobs)
    ]
    assert set(members) == set(slurm.NODES), "members side by side"
    with_gpu = [job["Comment"] for job in jobs if "gpu:1" in job.get("TresPerJob", "") + job.get("TresPerNode", "")]
    assert len(with_gpu) == 1 and "rule_calibration" in with_gpu[0], "it asked for one"
    assert all(job["MinMemoryNode"] == "2000M" for job in jobs), "as plan.LEAST_MEMORY_MB has it"


def same_files(here: Path, there: Path) -> int:
    """How many files of all artefacts but the report's pages are the same byte for byte, which all must be; and all keys."""
    folders = [
        sorted(p.relative_to(place) for p in place.glob("results/*/*-????????????") if p.is_dir()) for place in (here, there)
    ]
    assert folders[0] == folders[1]
    count = 0
    for folder in folders[0]:
        stage = folder.parts[1]
        names = {p.relative_to(here / folder) for p in (here / folder).rglob("*") if p.is_file() and p.name not in ALONE}
        assert names == {
            p.relative_to(there / folder) for p in (there / folder).rglob("*") if p.is_file() and p.name not in ALONE
        }
        hashes = [read_json(place / folder / "provenance.json")["files"] for place in (here, there)]
        for name in names - {Path("log.txt")}:
            if stage != "report":
                assert (here / folder / name).read_bytes() == (there / folder / name).read_bytes(), folder / name
                count += 1
        assert stage == "report" or {n: h for n, h in hashes[0].items() if n not in ALONE} == {
            n: h for n, h in hashes[1].items() if n not in ALONE
        }
    return count
