"""The DAG's jobs through Snakemake's Kubernetes executor, as far as one machine goes: `make cluster-test`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import small_experiment
from moepress.composing import ROOT

sys.path.insert(0, str(Path(__file__).parent))
import pods
import s3


@pytest.mark.cluster
def test_an_experiment_in_pods(tmp_path, model_folder, text_folder):
    """Every job's command line works in an empty folder with nothing but an image and a bucket; the results come back whole."""
    for module in ("moto.server", "snakemake_storage_plugin_s3", "snakemake_executor_plugin_kubernetes"):
        pytest.importorskip(module, reason=f"no {module} here: pip install '.[cluster,cluster-test]'")
    checkout = tmp_path / "checkout"
    for name in ("src", "conf", "workflow"):
        shutil.copytree(ROOT / name, checkout / name)
    for name in ("Snakefile", "environment.yml"):
        shutil.copy(ROOT / name, checkout)
    (checkout / "profiles").symlink_to("workflow/profiles")
    image = {"PYTHONPATH": str(checkout / "src"), "OMP_NUM_THREADS": "1"}
    asked = [*small_experiment(model_folder, text_folder), "latency.repeats=0", "device=cpu", "quantization=none"]
    asked += ["hydra.launcher.profile=kubernetes", "hydra.launcher.cores=1"]
    asked += ["hydra.launcher.storage=s3://moepress/team"]
    asked += ["hydra.launcher.arguments=[--container-image,moepress,--seconds-between-status-checks,2]"]
    with s3.Server() as server, pods.Pods(tmp_path / "pods", image) as cluster:
        env = {**server.env, **cluster.env, **image}
        command = [sys.executable, "-m", "moepress", *asked]
        done = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr + "".join(path.read_text() for path in cluster.place.glob("*.log"))
        bodies = list(cluster.bodies.values())

    report = Path(done.stdout.splitlines()[-1])
    assert (checkout / report / "runs.csv").is_file()
    whole = [path.parent for path in checkout.glob("results/*/*/provenance.json")]
    assert len(bodies) == len(whole) == 4, "every artefact was one job, in a pod"
    command = [sys.executable, "-m", "moepress", "verify"]
    told = subprocess.run(command, cwd=checkout, env={**os.environ, **image}, capture_output=True, text=True, check=False)
    assert told.returncode == 0 and "4 artefacts, every file as it was left" in told.stdout
    containers = [body["spec"]["template"]["spec"]["containers"][0] for body in bodies]
    assert {each["image"] for each in containers} == {"moepress"}
    assert {each["resources"]["limits"]["memory"] for each in containers} == {"2000M"}, "as plan.LEAST_MEMORY_MB has it"
