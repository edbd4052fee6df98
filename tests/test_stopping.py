"""A stage stopped in the middle of its layers: whole layers are kept, and it ends with the bytes of one that was not."""

import json
import os
import signal
import subprocess
import sys

import pytest

from moepress import artefacts, plan


def alone(finished, stage, *settings):
    """A stage's command into results of its own, where they are, and where those of the undisturbed stage are."""
    folder, overrides = finished
    results = folder / "results"
    planned = plan.for_overrides([*overrides, *settings, f"paths.results={results}"])
    (name,) = (name for name, item in planned.artefacts.items() if item.stage == stage)
    whole, out = results / name, folder / "again" / name
    out.parent.mkdir(parents=True)
    for found in planned.artefacts[name].inputs.values():
        (folder / "again" / found.stage).symlink_to(results / found.stage)
    task = artefacts.task_path(results, name)
    if not whole.exists():
        artefacts.run_stage(task, whole)
    return [sys.executable, "-m", "moepress.stages", str(task), str(out)], out, whole


def assert_same_bytes(out, whole):
    for path in whole.glob("*"):
        if path.suffix in (".safetensors", ".json") and path.name not in ("provenance.json", "timing.json"):
            assert path.read_bytes() == (out / path.name).read_bytes(), path.name
    assert {path.name for path in whole.iterdir()} == {path.name for path in out.iterdir()}


STOPS_ITSELF = """
import os, sys
stopped = []
def stop(event, arguments):
    if event == "open" and not stopped and os.path.exists({state!r}):
        stopped.append(event)
        os.kill(os.getpid(), {how})
sys.addaudithook(stop)
"""
"""What a Python that finds it as sitecustomize.py does as soon as a layer is whole."""


@pytest.mark.parametrize(
    ("stage", "how"),
    [
        ("statistics", signal.SIGKILL),
        ("gradients", signal.SIGKILL),
        ("quantization", signal.SIGKILL),
        ("quantization", signal.SIGINT),
        pytest.param("statistics", signal.SIGINT, marks=pytest.mark.soak),
        pytest.param("gradients", signal.SIGINT, marks=pytest.mark.soak),
    ],
)
def test_stopped_and_started_again(finished, stage, how):
    """Stopped behind the first layer: at the first file that it opens then."""
    command, out, whole = alone(finished, stage, *(["allocation=global"] if stage == "gradients" else []))
    inside = "streams/backward" if stage == "gradients" else "streams"
    state = out.with_name(f"{out.name}.partial") / inside / "next_layer.json"
    (finished[0] / "sitecustomize.py").write_text(STOPS_ITSELF.format(state=str(state), how=int(how)))
    env = {**os.environ, "PYTHONPATH": f"{finished[0]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    stopped = subprocess.run(command, env=env, capture_output=True, text=True)
    assert stopped.returncode in (-how, 1) and not out.exists(), stopped.stderr
    assert json.loads(state.read_text())["next_layer"] >= 1
    subprocess.run(command, check=True, capture_output=True)
    assert_same_bytes(out, whole)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="needs root, to mount a small disk")
def test_a_full_disk_in_the_middle_of_a_layer(finished):
    """A disk that gets a little more after each failure: the error says so, whole layers are kept, the bytes are the same."""
    disk = finished[0] / "again"
    disk.mkdir()
    size = 640
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("this system lets nobody mount")
    try:
        command, out, whole = alone(finished, "quantization")
        failures, layers_kept = [], []
        while not out.exists():
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                assert "Traceback" not in done.stderr, done.stderr
                failures.append("the disk is full" in done.stderr and "whole layers are kept" in done.stderr)
                state = out.with_name(f"{out.name}.partial") / "streams" / "next_layer.json"
                layers_kept.append(json.loads(state.read_text())["next_layer"] if state.exists() else 0)
                size += 96
                subprocess.run(["mount", "-o", f"remount,size={size}k", str(disk)], check=True)
        assert failures and all(failures) and layers_kept == sorted(layers_kept)
        assert_same_bytes(out, whole)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
