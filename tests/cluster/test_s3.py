"""Results in a bucket of moto's S3 server, shared by folders that stand for machines. `make cluster-test`."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import small_experiment

sys.path.insert(0, str(Path(__file__).parent))
import s3

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def server():
    for module in ("moto.server", "snakemake_storage_plugin_s3"):
        pytest.importorskip(module, reason=f"no {module} here: pip install '.[cluster]'")
    with s3.Server() as running:
        yield running


def test_two_machines_share_what_either_computed(tmp_path, model_folder, text_folder, server):
    """The second computes only what the first has not, and then has all of it, byte for byte; and the other way round."""
    here, there = tmp_path / "here", tmp_path / "there"
    base = [*small_experiment(model_folder, text_folder), "latency.repeats=0", "device=cpu", "allocation=uniform"]
    base += ["allocation.bits=3", "hydra.launcher.storage=s3://moepress/team/one", "hydra.launcher.cores=1"]
    sweep = ["--multirun", *base, "quantization=none,rtn"]

    started = run(here, [*base, "quantization=none"], server)
    assert sorted(line.split()[0] for line in started) == ["corpus", "evaluation", "model", "report"]
    started = run(there, sweep, server)
    assert [line.split()[0] for line in started] == ["allocation", "quantization", "evaluation", "report"]
    assert run(here, sweep, server) == [], "the other machine has made it"

    folders = [artefacts(place) for place in (here, there)]
    (alone,) = set(folders[0]) - set(folders[1])  # here's report of its first experiment, which nobody asked for there
    assert alone.startswith("report/16bit-") and not set(folders[1]) - set(folders[0])
    for folder in folders[1]:
        for path in (there / "results" / folder).rglob("*"):
            if path.is_file() and path.name != ".snakemake_timestamp":
                assert path.read_bytes() == (here / path.relative_to(there)).read_bytes(), path
    for place in (here, there):
        command = [sys.executable, "-m", "moepress", "verify"]
        done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
        assert done.returncode == 0 and "every file as it was left" in done.stdout, done.stdout
    assert not [key for key in server.keys("team/one") if ".partial" in key or "/tasks/" in key or key.endswith(".lock")]


def run(place: Path, overrides: list[str], server) -> list[str]:
    """What the stages said that were started: `<stage> <artefact>`, in turn."""
    place.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "moepress", *overrides]
    env = {**server.env, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = (done.stdout + done.stderr).splitlines()
    return [line.removesuffix(": started") for line in lines if line.endswith(": started")]


def artefacts(place: Path) -> list[str]:
    return sorted(f"{path.parent.name}/{path.name}" for path in place.glob("results/*/*-????????????") if path.is_dir())


SNAKEFILE = """
import os, signal
from pathlib import Path
from snakemake_storage_plugin_s3 import StorageObject

s3obj, get_subkeys = StorageObject.s3obj, StorageObject.get_subkeys
def dying_s3obj(self, subkey=""):
    if str(subkey) == os.environ.get("DIES_STORING"):
        os.kill(os.getpid(), signal.SIGKILL)
    return s3obj(self, subkey)
def dying_get_subkeys(self):
    for item in get_subkeys(self):
        if "DIES_FETCHING" in os.environ and any(Path("results/thing").glob(".*.fetched/*")):
            os.kill(os.getpid(), signal.SIGKILL)
        yield item
StorageObject.s3obj, StorageObject.get_subkeys = dying_s3obj, dying_get_subkeys

from moepress import buckets, patches
patches.apply()
buckets.apply(workflow, "results")

rule here:
    input: "results/thing/a-0123456789ab"
    shell: ":"
rule thing:
    output: directory("results/thing/{id}")
    shell: '''echo made >> made
        test -e {output}/provenance.json && exit
        mkdir {output}; echo one > {output}/one; echo two > {output}/two
        echo '{{"files": {{"one": {{"bytes": 4}}, "two": {{"bytes": 4}}}}}}' > {output}/provenance.json'''
"""
"""One artefact of a stage that finds what is whole already; dies at a moment that the environment names."""
FOLDER = "results/thing/a-0123456789ab"
FILES = {"one": "one\n", "two": "two\n"}


def snakemake(place: Path, server, prefix: str, **env) -> int:
    place.mkdir(exist_ok=True)
    (place / "Snakefile").write_text(SNAKEFILE)
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--nolock", "--keep-storage-local-copies"]
    command += [
        "--ignore-incomplete",
        "--default-storage-provider",
        "s3",
        "--default-storage-prefix",
        f"s3://moepress/{prefix}",
        "here",
    ]
    done = subprocess.run(command, cwd=place, env={**server.env, **env}, capture_output=True, text=True, check=False)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


def content(place: Path) -> dict[str, str]:
    return {name: (place / FOLDER / name).read_text() for name in FILES}


@pytest.mark.parametrize("dies_storing", ["one", "two", "provenance.json"])
def test_killed_while_a_folder_is_stored(tmp_path, server, dies_storing):
    """Half a folder in a bucket counts as none: another machine makes its own, the same one stores the rest of what it has."""
    first, second, prefix = tmp_path / "first", tmp_path / "second", f"storing-{dies_storing}"
    assert snakemake(first, server, prefix, DIES_STORING=dies_storing) == -signal.SIGKILL
    assert len(server.keys(f"{prefix}/{FOLDER}")) < 4, "it did die on the way"
    assert snakemake(first, server, prefix) == 0
    assert len(server.keys(f"{prefix}/{FOLDER}/")) >= 3 and content(first) == FILES
    server.bucket.Object(f"{prefix}/{FOLDER}/{dies_storing}").delete()
    assert snakemake(second, server, prefix) == 0 and (second / "made").exists()
    assert f"{prefix}/{FOLDER}/{dies_storing}" in server.keys(prefix)


def test_killed_while_a_folder_is_fetched(tmp_path, server):
    """It gets its name when it is complete."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert snakemake(first, server, "fetching") == 0
    assert snakemake(second, server, "fetching", DIES_FETCHING="1") == -signal.SIGKILL
    assert not (second / FOLDER).exists() and any(second.glob("results/thing/.*.fetched/*"))
    assert snakemake(second, server, "fetching") == 0
    assert content(second) == FILES and not (second / "made").exists() and not any(second.glob("results/thing/.*.fetched"))


def test_results_from_before_the_bucket_are_stored(tmp_path, server):
    """Neither removed nor, by the next machine, made again."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert snakemake(first, server, "other") == 0
    before = (first / FOLDER / "one").stat().st_ino
    assert snakemake(first, server, "later") == 0
    assert (first / FOLDER / "one").stat().st_ino == before and content(first) == FILES
    assert snakemake(second, server, "later") == 0 and not (second / "made").exists() and content(second) == FILES


def test_only_s3_and_only_names_that_a_bucket_has(tmp_path):
    from types import SimpleNamespace

    from moepress import buckets

    def workflow(provider):
        settings = SimpleNamespace(default_storage_provider=provider, default_storage_prefix="x")
        return SimpleNamespace(storage_settings=settings, storage_registry=SimpleNamespace(default_storage_provider=object()))

    buckets.apply(workflow(None), "results")
    with pytest.raises(ValueError, match=r"--default-storage-provider fs: only s3"):
        buckets.apply(workflow("fs"), "results")
    with pytest.raises(ValueError, match=r"paths\.results=\.\./results: in a bucket"):
        buckets.apply(workflow("s3"), "../results")
