"""What docs/reliability.md promises: killed anywhere, damaged, two at a time, on a machine that fails. More: `make soak`."""

import errno
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import yaml

from conftest import until
from moepress import artefacts, integrity, locks, plan
from moepress.commands import verify
from moepress.composing import ROOT
from moepress.dag import STAGES

MOEPRESS = [sys.executable, "-m", "moepress"]


def run(folder, overrides, **options):
    return subprocess.run([*MOEPRESS, *overrides], cwd=folder, capture_output=True, text=True, **options)


def begin(folder, overrides, **options):
    log = (folder / "out.txt").open("a")
    return subprocess.Popen([*MOEPRESS, *overrides], cwd=folder, stdout=log, stderr=log, start_new_session=True, **options)


def folders(place):
    return sorted(path for path in (place / "results").glob("*/*-????????????") if path.is_dir())


def written(place):
    """When each artefact was finished."""
    return {path.name: (path / "provenance.json").stat().st_mtime_ns for path in folders(place)}


# --- killed ----------------------------------------------------------------------------------------------------------


def test_kills_over_all_stages(tmp_path):
    command = [sys.executable, str(Path(__file__).with_name("faults.py")), "--kills", "16", "--place", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kills survived, every byte as in undisturbed runs" in done.stdout
    told = {
        line["stage"]: line for line in map(json.loads, filter(lambda line: line.startswith("{"), done.stdout.splitlines()))
    }
    assert told.keys() == {*STAGES, "report"} - {"statistics_block"}
    assert all(line.get("kills") for line in told.values()), done.stdout


def test_snakemake_alone_is_killed(finished):
    """Its lock stays, and a stage that it has started works on: the next run says so, waits for that stage, and goes on."""
    folder, overrides = finished
    with report_held_up(folder):
        running = begin(folder, overrides)
        until(lambda: "makes results/report/" in text(folder), running)
        (snakemake,) = (child for child in children(running.pid) if "snakemake" in command_of(child))
        os.kill(snakemake, signal.SIGKILL)
        assert running.wait(60) == 1
        assert list(folder.glob(".snakemake/locks/*.lock"))
        again = begin(folder, overrides)
        until(lambda: "the last run here was killed; going on from what is whole" in text(folder), again)
    assert again.wait(120) == 0, text(folder)
    assert not list(folder.glob("results/*/*.partial")) and not list(folder.glob("results/*/.*.lock"))


@pytest.mark.soak
def test_a_plain_snakemake_is_killed(finished):
    """The other door: its next run frees the folder, too."""
    folder, overrides = finished
    shutil.rmtree(folder / "results" / "report")
    line = " ".join(shlex.quote(override) for override in overrides)
    command = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "Snakefile"), "--cores", "1"]
    command += ["--config", f"experiments={json.dumps([line])}"]
    with (folder / "out.txt").open("w") as log:
        running = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    until(lambda: list(folder.glob("results/report/*.partial")), running)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    again = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert again.returncode == 0 and "going on from what is whole" in again.stderr, again.stderr
    assert list(folder.glob("results/report/*/runs.csv"))


@pytest.mark.soak
def test_moepress_alone_is_killed(finished):
    """Its Snakemake works on, and the next run waits for that."""
    folder, overrides = finished
    shutil.rmtree(folder / "results" / "report")
    running = begin(folder, overrides)
    until(lambda: list(folder.glob("results/report/*.partial")), running)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    second = run(folder, overrides)
    assert second.returncode == 0 and "waiting for it" in second.stderr and "computed already" in second.stderr, second.stderr


@pytest.mark.soak
def test_a_stage_alone_is_killed(finished):
    """As the kernel does it where memory ends: the run says which one, and how to go on."""
    folder, overrides = finished
    shutil.rmtree(folder / "results" / "latency")
    shutil.rmtree(folder / "results" / "report")
    running = begin(folder, [*overrides, "cores=1"])
    (partial,) = until(lambda: list(folder.glob("results/latency/*.partial")), running)
    stages = [p for p in psutil.process_iter(["cmdline", "cwd"]) if p.info["cwd"] == str(folder)]
    (stage,) = (p for p in stages if p.info["cmdline"][1:3] == ["-m", "moepress.stages"])
    stage.kill()
    assert running.wait(300) == 1
    said = text(folder)
    assert f"latency/{partial.name.removesuffix('.partial')}: killed, for want of memory if nobody did it" in said, said
    assert "1 of 11 artefacts failed" in said and len(list(folder.glob("results/latency/*-????????????"))) == 1, said
    assert run(folder, overrides).returncode == 0


def children(pid):
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def command_of(pid):
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


# --- damaged ---------------------------------------------------------------------------------------------------------


def flip(rng, path, other):
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def truncate(rng, path, other):
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def grow(rng, path, other):
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randint(1, 9)))


def swap(rng, path, other):
    path.write_bytes(other.read_bytes())


def missing(rng, path, other):
    path.unlink()


DAMAGES = (flip, truncate, grow, swap, missing)


def test_damage_of_every_file_type_is_named(finished):
    """Every kind of damage to files of every type, drawn at random: seen, and nothing else is."""
    folder, _ = finished
    rng = random.Random(0)
    files = [p for each in folders(folder) for p in sorted(each.rglob("*")) if p.is_file() and p.stat().st_size]
    by_type: dict[str, list[Path]] = {}
    for path in files:
        by_type.setdefault(path.name if path.name == "provenance.json" else path.suffix, []).append(path)
    assert {".safetensors", ".json", ".yaml", ".parquet", ".csv", ".html", ".svg", "provenance.json"} <= by_type.keys()
    assert not list(integrity.damages([(each, True) for each in folders(folder)]))
    seen = 0
    for paths in by_type.values():
        for damage in DAMAGES * 6:
            path = rng.choice(paths)
            whole = path.read_bytes()
            other = rng.choice([p for p in files if p.read_bytes() != whole])
            damage(rng, path, other)
            owner = next(each for each in folders(folder) if path.is_relative_to(each))
            (found,) = integrity.damages([(owner, True)])
            assert found.path == path and found.folder == owner
            path.write_bytes(whole)
            seen += 1
    assert seen == 30 * len(by_type)


def test_every_bit_of_provenance_counts(finished):
    folder, _ = finished
    path = next(folder.glob("results/calibration/*/provenance.json"))
    whole = path.read_bytes()
    for place_of_bit in range(0, 8 * len(whole), 7):
        data = bytearray(whole)
        data[place_of_bit // 8] ^= 1 << place_of_bit % 8
        path.write_bytes(data)
        assert list(integrity.damages([(path.parent, True)])), f"bit {place_of_bit}"


def test_the_stage_that_would_read_it_stops(finished):
    folder, overrides = finished
    rng = random.Random(1)
    planned = plan.for_overrides([*overrides, f"paths.results={folder / 'results'}"])
    stages = set()
    for name, item in planned.artefacts.items():
        for found in item.inputs.values():
            unread = item.stage in ("report", "allocation", "calibration") and found.stage in ("model", "quantization")
            source = folder / "results" / found.folder
            files = [p for p in sorted(source.rglob("*")) if p.is_file() and p.stat().st_size]
            path = rng.choice([p for p in files if p.suffix != ".safetensors" or not unread])
            whole, out = path.read_bytes(), folder / "results" / item.stage / "again"
            rng.choice([flip, truncate])(rng, path, None)
            with pytest.raises(ValueError) as error:
                artefacts.run_stage(artefacts.task_path(folder / "results", name), out)
            assert str(path) in str(error.value) and "moepress verify" in str(error.value)
            assert not out.exists()
            path.write_bytes(whole)
            stages.add(item.stage)
    assert stages >= {"calibration", "statistics", "allocation", "quantization", "evaluation", "latency", "report"}


def test_a_model_outside_of_the_results_is_checked_too(finished, tmp_path):
    folder, _ = finished
    (source,) = folder.glob("results/model/*-????????????")
    (file,) = (Path(yaml.safe_load((source / "reference.json").read_text())["path"])).glob("*.safetensors")
    whole = file.read_bytes()
    try:
        flip(random.Random(2), file, None)
        (found,) = integrity.damages([(source, True)])
        assert found.path == file and found.outside
        assert not list(integrity.damages([(source, False)])), "where only headers are read, weights are not hashed"
    finally:
        file.write_bytes(whole)


def test_a_model_outside_that_lacks_a_file_and_one_with_another_readme(finished, tmp_path):
    folder, _ = finished
    (source,) = folder.glob("results/model/*-????????????")
    reference = json.loads((source / "reference.json").read_text())
    model = shutil.copytree(reference["path"], tmp_path / "model")
    (model / "README.md").write_text("Mine.")
    reference["path"], reference["files"]["README.md"] = str(model), "0" * 64
    artefacts.write_json(source / "reference.json", reference)
    told = json.loads((source / "provenance.json").read_text())
    told["files"]["reference.json"] = artefacts.record(source / "reference.json")
    del told[integrity.SEAL]
    artefacts.write_json(source / "provenance.json", integrity.sealed(told))
    assert not list(integrity.damages([(source, True)])), "its README may change"
    (model / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=rf"{model}/tokenizer\.json: missing; put back .* was moved, remove that folder"):
        integrity.check([(source, False)], folder / "results")


def test_folders_that_are_not_what_their_stage_left(finished):
    folder, _ = finished
    (checkpoint,) = folder.glob("results/quantization/*-????????????")
    (checkpoint / "more.safetensors").write_bytes(b"")
    (found,) = integrity.damages([(checkpoint, True)])
    assert str(found) == f"{checkpoint}/more.safetensors: no part of this artefact: unexpected weights"
    (statistics,) = folder.glob("results/statistics/*-????????????")
    other = shutil.copytree(statistics, statistics.with_name("other-0123456789ab"))
    (found,) = integrity.damages([(other, True)])
    assert found.what == f"of another artefact, statistics {statistics.name[-12:]}"
    told = json.loads((statistics / "provenance.json").read_text())
    del told[integrity.SEAL]
    artefacts.write_json(statistics / "provenance.json", told)
    (found,) = integrity.damages([(statistics, True)])
    assert found.what == "altered, its sha256 is not its own", "none at all is none of its own"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied"), "cannot be written"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory"), "cannot be written"),
        (MemoryError(), "not enough memory (MemoryError)"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes\nmore"),
            "can't allocate memory: you tried 9 bytes)",
        ),
        (ImportError("libtorch.so: failed to map segment from shared object"), "not enough memory (libtorch.so: failed to map"),
        (ValueError("seed=x"), None),
    ],
)
def test_errors_of_the_machine_say_what_can_be_done(error, said):
    found = artefacts.of_the_machine(error)
    assert found is None if said is None else said in found


def test_what_is_newer_than_now_is_set_back(tmp_path):
    for name in ("input", "task.yaml", "old"):
        (tmp_path / name).mkdir() if name == "input" else (tmp_path / name).touch()
    stamp, now = tmp_path / "input" / ".snakemake_timestamp", time.time()
    stamp.touch()
    os.utime(tmp_path / "old", (5, 5))
    for path in (tmp_path / "input", stamp, tmp_path / "task.yaml"):
        os.utime(path, (now + 9999, now + 9999))
    artefacts.not_of_the_future([tmp_path / name for name in ("input", "task.yaml", "old", "not there")])
    assert all(path.stat().st_mtime <= time.time() for path in tmp_path.rglob("*"))
    assert (tmp_path / "old").stat().st_mtime == 5


def test_verify_names_deletes_and_the_run_computes_again(finished, capsys):
    folder, _ = finished
    results = folder / "results"
    where = [f"--results={results}"]
    verify.main(where)
    assert f"{len(folders(folder))} artefacts, every file as it was left" in capsys.readouterr().out
    (broken,) = results.glob("allocation/*/allocation.json")
    truncate(random.Random(3), broken, None)
    with pytest.raises(SystemExit) as ended:
        verify.main(where)
    said = capsys.readouterr().out
    assert ended.value.code == 1 and f"{broken}: truncated" in said and "made from these" in said
    made = {line.strip() for line in said.splitlines() if line.startswith("  ")}
    assert {Path(line).parent.name for line in made} == {"allocation", "quantization", "evaluation", "latency", "report"}
    with locks.hold(locks.of(broken.parent), shared=True), pytest.raises(SystemExit):
        verify.main([*where, "--delete", "--only-damaged"])
    assert "not removed" in capsys.readouterr().out and broken.exists(), "a stage reads it"
    verify.main([*where, "--delete", "--only-damaged"])
    assert not broken.parent.exists() and list(results.glob("report/*"))
    verify.main(where)
    shutil.rmtree(results / "calibration")
    verify.main(where)
    assert "every file as it was left" in capsys.readouterr().out


def test_verify_of_other_results_wants_their_name(finished, tmp_path_factory):
    folder, _ = finished
    (there,) = folder.glob("results/calibration/*-????????????")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    elsewhere.joinpath("calibration").mkdir()
    with pytest.raises(ValueError, match=rf"none of {elsewhere}; give --results={folder / 'results'}"):
        verify.main([str(there), f"--results={elsewhere}", "--delete"])
    verify.main([str(there), f"--results={folder / 'results'}"])


# --- two at a time ---------------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from moepress import locks
with locks.hold(Path(sys.argv[1]), "has it", shared=sys.argv[2] == "shared"):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(path, kind):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path), kind], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_lock_is_held_by_the_living_only(tmp_path):
    path = tmp_path / "stage" / ".a.lock"
    one = holder(path, "alone")
    with pytest.raises(locks.Held, match=f"process {one.pid} on "), locks.hold(path):
        pass
    one.kill(), one.wait()
    with locks.hold(path):
        assert path.exists()
    assert not path.exists()
    readers = [holder(path, "shared"), holder(path, "shared")]
    with pytest.raises(locks.Held), locks.hold(path):
        pass
    for each in readers:
        each.kill(), each.wait()
    with locks.hold(path), pytest.raises(locks.Held), locks.hold(path, shared=True):
        pass


def test_a_file_system_without_locks_warns(tmp_path, monkeypatch, capsys):
    def flock(file, kind):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with locks.hold(tmp_path / ".a.lock") as held:
        assert held is None
    assert f"{tmp_path} has no locks; let no two runs work there at a time" in capsys.readouterr().err


def test_two_checkouts_share_results(finished, tmp_path_factory):
    """Both ask for the same at the same time: each artefact is made once, and both end well."""
    folder, overrides = finished
    other = tmp_path_factory.mktemp("other")
    shared = [*overrides, f"paths.results={folder / 'results'}"]
    shutil.rmtree(next(folder.glob("results/latency/qesc-*")))
    shutil.rmtree(folder / "results" / "report")
    both = [begin(folder, shared), begin(other, shared)]
    assert [each.wait(300) for each in both] == [0, 0], (folder / "out.txt").read_text() + (other / "out.txt").read_text()
    said = (folder / "out.txt").read_text() + (other / "out.txt").read_text()
    made = [line for line in said.splitlines() if line.endswith(" s") and ": done in " in line]
    assert len(made) == len(set(line.split(": done")[0] for line in made)) == 2, said
    assert not list(folder.glob("results/*/*.partial")) and not list(folder.glob("results/*/.*.lock"))


def test_what_another_run_has_finished_is_not_removed(finished):
    """Snakemake would remove a job's output before it starts, even where another run has made it since."""
    folder, overrides = finished
    latencies = sorted((folder / "results" / "latency").iterdir())
    kept = folder / "kept"
    shutil.move(folder / "results" / "latency", kept)
    shutil.rmtree(folder / "results" / "report")
    with locks.hold(locks.of(latencies[0])), locks.hold(locks.of(latencies[1])):
        running = begin(folder, [*overrides, "cores=1"])
        said = until(lambda: [x for x in latencies if f"makes results/latency/{x.name}" in text(folder)], running)
        (late,) = set(latencies) - set(said)
        (kept / late.name).rename(late)
        inode = (late / "provenance.json").stat().st_ino
    assert running.wait(120) == 0, text(folder)
    assert (late / "provenance.json").stat().st_ino == inode


def text(folder):
    return (folder / "out.txt").read_text()


@contextmanager
def report_held_up(folder):
    """There is none, and the stage that makes it waits as long as this lasts."""
    (report,) = (folder / "results" / "report").iterdir()
    shutil.rmtree(report)
    with locks.hold(locks.of(report)):
        yield


def test_the_second_run_in_a_folder_waits(finished):
    folder, overrides = finished
    with report_held_up(folder):
        running = begin(folder, overrides)
        until(lambda: "makes results/report/" in text(folder), running)
        second = begin(folder, overrides)
        until(lambda: "waiting for it (Ctrl-C" in text(folder), second)
        assert running.poll() is None
    assert second.wait(120) == running.wait(60) == 0
    assert "everything is computed already" in text(folder)


# --- a machine that fails --------------------------------------------------------------------------------------------


@pytest.mark.soak
def test_a_clock_that_jumps(finished):
    """Half of what there is comes from next year, half from the last one: only what is missing is computed."""
    folder, overrides = finished
    (gone,) = folder.glob("results/latency/qesc-*")
    shutil.rmtree(gone)
    shutil.rmtree(folder / "results" / "report")
    before = written(folder)
    for number, path in enumerate(sorted(folder.rglob("*"))):
        jump = time.time() + (365 if number % 2 else -365) * 86400
        os.utime(path, (jump, jump))
    jumped = written(folder)
    done = run(folder, overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    after = written(folder)
    assert {name for name in after if after[name] != jumped.get(name)} == after.keys() - before.keys()
    assert {name.split("-")[0] for name in after.keys() - before.keys()} == {"qesc"}
    assert "computed already" in run(folder, overrides).stderr


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="needs root, to mount what is only read")
def test_results_that_are_only_read(finished):
    folder, overrides = finished
    results = folder / "results"
    if subprocess.run(["mount", "--bind", str(results), str(results)], capture_output=True).returncode:
        pytest.skip("this system lets nobody mount")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(results)], check=True)
        done = run(folder, overrides)
        assert done.returncode == 0 and "computed already" in done.stderr, "what is there can be read"
        refused = run(folder, [*overrides, "seed=5"])
        assert refused.returncode == 1 and "Traceback" not in refused.stderr
        assert "cannot be written" in refused.stderr and "set paths.results" in refused.stderr
    finally:
        subprocess.run(["umount", str(results)], check=True)


LITTLE_MEMORY = """
import resource, sys
if any("latency/qesc" in word for word in sys.argv):
    resource.setrlimit(resource.RLIMIT_DATA, (300 * 2**20, 300 * 2**20))
"""


def test_a_stage_without_memory_stops_no_other(finished):
    folder, overrides = finished
    (folder / "sitecustomize.py").write_text(LITTLE_MEMORY)
    shutil.rmtree(folder / "results" / "latency")
    shutil.rmtree(folder / "results" / "report")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}
    done = subprocess.run([*MOEPRESS, *overrides], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert len(list(folder.glob("results/latency/16bit-????????????"))) == 1, "the others go on"
    assert "not enough memory" in done.stderr and "goes on from what is whole" in done.stderr, done.stderr
