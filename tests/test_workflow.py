"""The real Snakefile and the real command on a small random model: keys, caching, stopping and starting."""

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from conftest import small_experiment, until
from moepress.composing import ROOT

SECRETS = {"WANDB_API_KEY": "0f1e2d3c4b5a69788796a5b4c3d2e1f00f1e2d3c", "HF_TOKEN": "hf_aZbYcXdWeVfUgThSiRjQkPlOm"}
ENV = {**os.environ, **SECRETS}
QUICK = ["quantization=rtn", "allocation=uniform", "allocation.bits=3", "latency.repeats=0"]
"""Few stages: for what is not about them."""


@pytest.fixture(scope="module")
def place(tmp_path_factory, model_folder, text_folder):
    """A working folder, and the overrides of a small experiment in it."""
    return tmp_path_factory.mktemp("a place"), small_experiment(model_folder, text_folder)


def moepress(folder, *overrides, check=True):
    command = [sys.executable, "-m", "moepress", *overrides]
    done = subprocess.run(command, cwd=folder, env=ENV, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def artefacts(folder):
    found = {str(p.relative_to(folder / "results")) for p in (folder / "results").glob("*/*-????????????") if p.is_dir()}
    return {name for name in found if not name.startswith("wandb/")}


def test_one_experiment_and_its_neighbours(place, tmp_path):
    folder, (_, small) = tmp_path, place
    first = moepress(folder, *small, "tracking=offline")
    report = Path(first.stdout.splitlines()[-1])
    assert (folder / report / "index.html").is_file(), "the last line names the report folder"
    with (folder / report / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == ["16bit", "qesc-pmq-2.5"]
    assert float(rows[1]["bits_nominal"]) == 2.5 and float(rows[1]["selection_shift"]) > 0
    assert rows[1]["checkpoint_bytes"] == str(
        sum(p.stat().st_size for p in folder.glob("results/quantization/*/*.safetensors"))
    )
    stages = len(list(folder.glob("results/*/*/provenance.json")))
    assert len(list(folder.glob("results/wandb/offline-run-*"))) == stages + len(rows), "mirrored without a key"
    for path in (path for path in folder.rglob("*") if path.is_file()):
        assert not any(secret.encode() in path.read_bytes() for secret in SECRETS.values()), f"{path} holds a secret"
    assert not list(folder.glob("results/*/*.partial"))

    # every folder is whole: configuration, provenance, hashes
    for name in artefacts(folder):
        stage, key = name.split("/")[0], name[-12:]
        described = yaml.safe_load((folder / "results" / name / "config.yaml").read_text())
        provenance = json.loads((folder / "results" / name / "provenance.json").read_text())
        assert described["stage"] == provenance["stage"] == stage and described["key"] == provenance["key"] == key
        assert provenance["files"] and provenance["seconds"] >= 0 and provenance["versions"]["moepress"]

    # the same again computes nothing; Snakemake's own door agrees
    before = artefacts(folder)
    assert "everything is computed already" in moepress(folder, *small).stderr
    line = " ".join(f"'{o}'" for o in small)
    command = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "Snakefile"), "--cores", "2", "-n"]
    command += ["--config", f"experiments={json.dumps([line])}"]
    dry = subprocess.run(command, cwd=folder, env=ENV, capture_output=True, text=True, check=True)
    assert "Nothing to be done" in dry.stdout + dry.stderr

    # a variant runs only its own stages
    moepress(folder, *small, "quantization=gptq", "pruning=pesf", "pruning.alpha=0.7")
    new = sorted(name.split("/")[0] for name in artefacts(folder) - before)
    assert new == ["evaluation", "latency", "pruning", "quantization", "report"]


def test_refused_before_anything_is_written(place, tmp_path):
    _, small = place
    for override, message in (
        ("allocation.bitz=3", "keys of allocation"),
        ("quantization.group_size=20", "quantization.group_size=20: a multiple of 8"),
        ("corpus.path=/nowhere", "corpus.path"),
        ("allocation.bits=1", "averages from 1.75 to 3.25 can be met"),
    ):
        done = moepress(tmp_path, *small, override, check=False)
        assert done.returncode != 0 and message in done.stdout + done.stderr
        assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_errors_in_a_stage_are_one_line(place):
    folder, small = place
    done = moepress(folder, *small, "calibration.num_sequences=400", check=False)
    assert done.returncode != 0 and "Traceback" not in done.stdout + done.stderr
    assert "moepress: calibration.num_sequences=400" in done.stdout + done.stderr
    assert "MissingOutput" not in done.stdout + done.stderr, "the stage's own exit code ends the job"


def test_control_c_at_any_moment(place):
    """The whole command stopped as a terminal does it; the folder is not left locked, and the next run goes on."""
    folder, small = place
    settings = [*small, *QUICK, "seed=7"]
    for seconds in (1, 4, 9):
        command = [sys.executable, "-m", "moepress", *settings]
        running = subprocess.Popen(command, cwd=folder, env=ENV, stderr=subprocess.DEVNULL, start_new_session=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.wait(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGINT)
        assert running.wait(60) in (0, 130), f"stopped after {seconds} s"
        assert not list(folder.glob(".snakemake/locks/*.lock")), f"stopped after {seconds} s"
        for name in artefacts(folder):
            assert (folder / "results" / name / "provenance.json").is_file(), f"{name} is not whole"
    report = moepress(folder, *settings).stdout.splitlines()[-1]
    assert (folder / report / "runs.csv").is_file()


@pytest.mark.parametrize(
    ("how", "to_all", "seed"), [(signal.SIGKILL, True, 11), (signal.SIGINT, True, 12), (signal.SIGTERM, False, 13)]
)
def test_a_sweep_stopped_and_started_again_only_finishes(place, how, to_all, seed):
    """The real launcher over the real Snakemake; killed, it leaves the folder locked, which the next run sees to; at a
    Ctrl-C, which a terminal sends to all of its processes, it unlocks the folder itself. So it does where only the command
    hears of it (`kill`)."""
    folder, small = place
    sweep = ["--multirun", *small, *QUICK, "quantization=rtn,gptq", f"seed={seed}"]
    before = artefacts(folder)
    command = [sys.executable, "-m", "moepress", *sweep]
    running = subprocess.Popen(command, cwd=folder, env=ENV, stderr=subprocess.PIPE, text=True, start_new_session=True)
    until(lambda: any(name.startswith("calibration/") for name in artefacts(folder) - before), running)
    os.killpg(running.pid, how) if to_all else os.kill(running.pid, how)
    said = running.communicate()[1]
    kept = artefacts(folder)
    made = {name: (folder / "results" / name / "provenance.json").read_bytes() for name in kept}
    assert not any(name.startswith("report/") for name in kept - before), "stopped in the middle"
    if how != signal.SIGKILL:
        assert running.returncode == 130 and "stopped; the same command goes on" in said and "Traceback" not in said
    assert bool(list(folder.glob(".snakemake/locks/*.lock"))) == (how == signal.SIGKILL)
    finished = moepress(folder, *sweep)
    assert ("going on from what is whole" in finished.stderr) == (how == signal.SIGKILL)
    assert all((folder / "results" / name / "provenance.json").read_bytes() == made[name] for name in kept)
    report = folder / finished.stdout.splitlines()[-1]
    with (report / "runs.csv").open() as file:
        assert [row["run"] for row in csv.DictReader(file)] == ["16bit", "rtn-3", "gptq-3"]
    once = [name.rpartition("-")[0] for name in artefacts(folder) - before]
    assert once.count("calibration/8x64") == once.count("quantization/gptq-3") == 1
    assert "everything is computed already" in moepress(folder, *sweep).stderr
