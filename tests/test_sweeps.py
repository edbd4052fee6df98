"""Sweeps: one DAG, each shared stage once, an objective or a failure for each member. Stages run in this process; the real
Snakemake runs a sweep in test_workflow.py."""

import itertools
import os
import shlex
import sys
import types
from pathlib import Path

import pytest
from hydra.core.plugins import Plugins
from hydra.core.utils import JobStatus

import hydra_plugins
from conftest import small_experiment
from moepress import artefacts, cli, composing, config, dag, execution, forecast, machine, plan, studies, sweeps

SHARED = {"model", "corpus", "calibration", "statistics"}


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def small(model_folder, text_folder):
    return [*small_experiment(model_folder, text_folder), "device=cpu"]


@pytest.fixture
def ran(monkeypatch):
    """Stages of the artefacts that were computed, by a stand-in for Snakemake that works in this process and goes on
    where a job fails."""
    done: list[str] = []

    def run(planned, experiments, settings=None):
        lines = [" ".join(map(shlex.quote, overrides)) for overrides in experiments]
        assert plan.from_snakemake({"experiments": lines}).targets == planned.targets, "Snakemake makes the same plan of it"
        results, failed = Path(planned.results), set()
        for folder, item in planned.artefacts.items():
            if (results / folder).exists():
                continue
            if any(found.folder in failed for found in item.inputs.values()):
                failed.add(folder)
                continue
            try:
                artefacts.run_stage(artefacts.task_path(results, folder), results / folder)
                done.append(item.stage)
            except ValueError as error:
                failed.add(folder)
                log = results / "logs" / f"{folder}.log"
                log.parent.mkdir(parents=True, exist_ok=True)
                log.write_text(f"{folder}: started\nmoepress: {error}\n")
        return int(bool(failed))

    monkeypatch.setattr(execution, "run", run)
    return done


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["moepress", *arguments])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    cli.main()


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["quantization=gptq", "allocation=uniform", "allocation.bits=3", "seed=4"],
        ["seed=4", "pruning.alpha=0.5", "pruning=pesf", "allocation.widths=[1,2]", "device=cpu"],
        ["corpus=local", "corpus.path=/a b/c", "corpus.fractions={train: 0.6, calibration: 0.2, test: 0.2}"],
        ["+model.extra=3", "~tracking.project", "cores=2"],
        ["hydra.launcher.cores=3", "objective=[ppl_mean,bits_effective]", "out=null"],
        ["paths.results=there", "model.name='a name'"],
    ],
)
def test_composing_from_cached_groups_is_what_hydra_composes(overrides):
    for _ in range(2):  # the second from the cache
        assert composing.composed(overrides) == composing._composed.__wrapped__(tuple(overrides), ())


@pytest.mark.parametrize(
    "overrides", [["allocation.bitz=3"], ["seed=1,2"], ["quantization=nothing"], ["x=1"], ["experiment=no"]]
)
def test_what_hydra_refuses_is_refused_alike(overrides):
    found = []
    for compose in (composing.composed, lambda o: composing._composed.__wrapped__(tuple(o), ())):
        with pytest.raises(Exception) as error:
            compose(overrides)
        found.append((error.type, str(error.value)))
    assert found[0] == found[1]


def test_a_changed_file_of_a_corpus_is_seen(small, text_folder, tmp_path):
    (tmp_path / "a.txt").write_text("one " * 300)
    own = [*small, f"corpus.path={tmp_path}"]
    before = config.resolve(own)["corpus"]["fingerprint"]
    assert config.resolve(own)["corpus"]["fingerprint"] == before
    (tmp_path / "a.txt").write_text("another " * 300)
    assert config.resolve(own)["corpus"]["fingerprint"] != before


def test_18_members_have_one_calibration_and_one_statistics(small):
    grid = itertools.product(("gptq", "qesc"), (2, 2.5, 3), (0.3, 0.5, 0.7))
    own = ["pruning=pesf"]
    varied = [[f"quantization={q}", f"allocation.bits={b}", f"pruning.alpha={a}"] for q, b, a in grid]
    members = [studies.experiment([*small, *own, *line]) for line in varied]
    found = dag.everything([studies.report_artefact(*plan.joined(members))]).values()
    counts = {stage: sum(item.stage == stage for item in found) for stage in dag.STAGES}
    assert all(counts[stage] == 1 for stage in SHARED)
    assert counts["quantization"] == 6 and counts["evaluation"] == 19, "and one of the 16-bit model"


def test_three_doors_have_the_same_keys(small, place, monkeypatch):
    lines = [f"quantization={q} allocation=uniform allocation.bits={b}" for q in ("rtn", "gptq") for b in (2, 3)]
    asked, small = [], [o for o in small if not o.startswith(("quantization=", "allocation="))]  # they would rule the lines'
    monkeypatch.setattr(execution, "run", lambda planned, *_: asked.append(planned))
    sweeps.Sweep(execution.Settings()).launch([[*small, *line.split()] for line in lines])
    own = " ".join(map(shlex.quote, small))
    by_snakemake = plan.from_snakemake({"experiments": [f"{own} {line}" for line in lines]})
    by_overrides = plan.from_snakemake({"experiments": lines, "overrides": own})
    study = {"name": "mine", "caption": "", "base": [], "experiments": lines}
    monkeypatch.setattr(plan, "load_study", lambda name: study)
    by_study = plan.for_overrides(["study=mine", *small])

    def keys(planned):
        return {folder for folder in planned.artefacts if not folder.startswith("report/")}

    assert asked[0].targets == by_snakemake.targets and asked[0].artefacts.keys() == by_snakemake.artefacts.keys()
    assert keys(asked[0]) == keys(by_snakemake) == keys(by_overrides) == keys(by_study)


def test_seeds_are_drawn_where_they_change_anything(small):
    small = [o for o in small if not o.startswith(("quantization=", "allocation="))]
    study = {"base": [], "experiments": ["quantization=gptq allocation=uniform", "quantization=rtn allocation=uniform"]}

    def drawn(**seeds):
        found = studies.study_experiments(study | seeds, small)[1:]  # behind the 16-bit model, which has no chance in it
        return [(m.config["quantization"]["method"], m.config["seed"]) for m in found]

    assert drawn() == drawn(seeds=[0]) == [("gptq", 0), ("rtn", 0)]
    assert drawn(seeds=[5]) == [("gptq", 5), ("rtn", 0)], "a single seed counts, too"
    assert drawn(seeds=[0, 1]) == [("gptq", 0), ("gptq", 1), ("rtn", 0)]


def test_a_study_that_is_no_yaml_is_refused_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "conf" / "study").mkdir(parents=True)
    (tmp_path / "conf" / "study" / "mine.yaml").write_text("name: [a\n")
    monkeypatch.setattr(studies, "ROOT", tmp_path)
    with pytest.raises(ValueError, match=r"study=mine: .*mine\.yaml is no YAML of a study: "):
        studies.load_study("mine")


def test_members_with_and_without_a_stage_have_their_own_rows(small, place, monkeypatch):
    """The artefacts of the one are a part of the other's."""
    rtn = [*small, "quantization=rtn", "allocation=uniform", "allocation.bits=3", "objective=row"]
    members = [studies.experiment([*rtn, f"latency.repeats={repeats}"]) for repeats in (0, 1)]
    done = plan.for_experiments(members)
    Path(done.report).mkdir(parents=True)
    monkeypatch.setattr(execution, "rows", lambda report: [{"row": number} for number in range(3)])
    assert [sweeps.objective(done, member) for member in members] == [1, 2], "behind the 16-bit model's"


def test_an_experiment_that_is_asked_for_twice_is_one_row(small):
    rtn = [studies.experiment([*small, "quantization=rtn", "allocation=uniform", f"seed={seed}"]) for seed in (0, 1)]
    assert [member.config["quantization"]["method"] for member in studies.compared(rtn)] == ["none", "rtn"]


def test_a_sweep_its_failures_and_one_that_overlaps(small, place, ran, monkeypatch, capsys):
    sweep = ["quantization=gptq", "allocation=uniform", "allocation.bits=2,3", "calibration.num_sequences=8,400"]
    with pytest.raises(SystemExit) as ended:
        command(monkeypatch, "--multirun", *small, *sweep)
    said = capsys.readouterr()
    assert ended.value.code == 1 and "Traceback" not in said.err
    assert "2 of 4 members failed" in said.err
    failed = [line for line in said.err.splitlines() if "needs 200 windows" in line and "the log: " in line]
    assert [line.split(": ")[1] for line in failed] == [
        f"calibration.num_sequences=400 allocation.bits={bits}" for bits in (2, 3)
    ], "a line for each: what it has of its own, the reason and the log"
    report = Path(said.out.splitlines()[-1])
    assert [row["run"] for row in execution.rows(report)] == ["16bit", "gptq-2", "gptq-3"]
    assert ran.count("calibration") == ran.count("model") == ran.count("report") == 1
    assert "perplexity" in said.out and "gptq-3" in said.out, "the table is in the terminal"

    ran.clear()
    overlapping = ["quantization=rtn,gptq", "allocation=uniform", "allocation.bits=3", "calibration.num_sequences=8"]
    command(monkeypatch, "--multirun", *small, *overlapping)
    assert sorted(ran) == ["evaluation", "latency", "quantization", "report"], "the difference: RTN"


def test_a_member_with_a_wrong_value_does_not_stop_the_others(small, place, ran):
    answers = sweeps.Sweep(execution.Settings()).launch(
        [[*small, "quantization=rtn", "allocation=uniform", f"allocation.bits={bits}"] for bits in (9, 3)]
    )
    assert [answer.status for answer in answers] == [JobStatus.FAILED, JobStatus.COMPLETED]
    with pytest.raises(sweeps.MemberFailed, match=r"allocation\.bits=9: .*allocation"):
        _ = answers[0].return_value
    assert answers[1].return_value > 1 and answers[1].cfg.allocation.bits == 3


def test_a_sweep_that_is_only_looked_at_has_no_failures(small, place, monkeypatch, capsys):
    monkeypatch.setattr(execution, "run", lambda *_: 0)  # as with hydra.launcher.arguments=[--dry-run]
    command(monkeypatch, "--multirun", *small, "quantization=rtn", "allocation=uniform", "allocation.bits=2,3")
    said = capsys.readouterr().err
    assert "asked for something else than a run" in said and "failed" not in said


GRID = Plugins.instance().class_name_to_class["hydra_plugins.moepress_launcher.GridSweeper"]


class Asking(GRID):
    """Asks for two widths, and then for the better one again beside a third."""

    def sweep(self, arguments):
        own = [argument for argument in arguments if not argument.startswith("allocation.bits=")]
        first = self.launcher.launch([[*own, f"allocation.bits={bits}"] for bits in (2, 3)], initial_job_idx=0)
        best = min(first, key=lambda answer: answer.return_value)
        second = self.launcher.launch([list(best.overrides), [*own, "allocation.bits=4"]], initial_job_idx=2)
        type(self).answers = [*first, *second]


Asking.__module__ = "hydra_plugins.moepress_asking"  # the only place that Hydra takes plugins from


def test_a_sweeper_that_asks_again(small, place, ran, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, Asking.__module__, types.SimpleNamespace(Asking=Asking))
    monkeypatch.setattr(hydra_plugins, "moepress_asking", sys.modules[Asking.__module__], raising=False)
    Plugins.instance().register(Asking)
    asking = ["hydra.sweeper._target_=hydra_plugins.moepress_asking.Asking", "quantization=rtn", "allocation=uniform"]
    command(monkeypatch, "--multirun", *small, *asking, "objective=delta_nll")
    report = Path(capsys.readouterr().out.splitlines()[-1])
    rows = {row["run"]: row for row in execution.rows(report)}
    values = [answer.return_value for answer in Asking.answers]
    assert set(rows) == {"16bit", "rtn-2", "rtn-3", "rtn-4"}, "the last report has all that were asked for, each once"
    assert values[:2] == [rows["rtn-2"]["delta_nll"], rows["rtn-3"]["delta_nll"]] and values[2] == min(values[:2])
    assert values[3] == rows["rtn-4"]["delta_nll"]
    assert ran.count("quantization") == 3 and ran.count("model") == 1

    member = studies.experiment(
        [*small, "quantization=rtn", "allocation=uniform", "allocation.bits=2", "objective=[ppl_mean,nothing]"]
    )
    done = plan.for_experiments([studies.experiment(Asking.answers[n].overrides) for n in (0, 1, 3)])
    with pytest.raises(ValueError, match=r"objective=nothing: runs\.csv has no such column; there is .*ppl_mean"):
        sweeps.objective(done, member)
    member.config["objective"] = ["ppl_mean", "bits_nominal"]
    assert sweeps.objective(done, member) == (rows["rtn-2"]["ppl_mean"], 2.0)
    member.config["objective"] = None
    assert sweeps.objective(done, member) is None


def test_what_no_member_can_be_is_refused_before_anything(small, place, monkeypatch, capsys):
    for argument in ("study=default", "out=there"):
        with pytest.raises(SystemExit) as ended:
            command(monkeypatch, "--multirun", *small, argument, "seed=0,1")
        assert f"moepress: {argument}: a s" in str(ended.value)
    with pytest.raises(ValueError, match=r"objective=3: expected a column of runs\.csv|objective=3"):
        config.resolve(["objective=3"])


def test_the_launchers_settings_become_snakemakes_options():
    options = execution.Settings().options(None)
    assert options[0] == "--cores" and "--executor" not in options and "--keep-going" in options
    cluster = execution.Settings(executor="slurm", jobs=16, profile="p", arguments=("--resources", "gpu=4"))
    assert cluster.options(None) == [
        *("--executor", "slurm", "--jobs", "16", "--workflow-profile", "p", "--keep-going", "--resources", "gpu=4"),
        *("--quiet", "host", "reason"),
    ], "why a cluster refused a job is told"
    assert execution.Settings(profile="default").options(2)[:2] == ["--cores", "2"], "Snakemake's own default needs a number"
    assert execution.Settings(cores=3).options(2)[:2] == ["--cores", "3"]
    assert execution.Settings().options(2)[:2] == ["--cores", "2"]


def test_times_of_a_gpu_elsewhere_want_its_name(small, place, monkeypatch):
    """Where jobs run elsewhere, `auto` is the machine that submits: without a GPU, no job on one could time under its name."""
    monkeypatch.setattr(machine, "has_gpu", lambda: False)
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    machine.hardware.cache_clear()
    slurm = execution.Settings(profile="slurm")
    for overrides in (["device=cuda"], ["device=cuda:1"]):
        with pytest.raises(ValueError, match=r"latency\.hardware=.*'NAME' latency\.threads=N .* or latency\.repeats=0"):
            execution.planned([*small, *overrides], slurm)
    assert not list(place.iterdir()), "nothing was written"
    for overrides in (
        ["device=cuda", "latency.hardware='H200'"],
        ["device=cuda", "latency.repeats=0"],
        ["device=cpu"],
    ):
        assert execution.planned([*small, *overrides], slurm).targets
    with pytest.raises(ValueError, match="this machine has no GPU"):
        execution.planned([*small, "device=cuda"], execution.Settings(profile="default"))
    (answer,) = sweeps.Sweep(slurm).launch([[*small, "device=cuda"]])
    with pytest.raises(sweeps.MemberFailed, match=r"latency\.hardware="):
        _ = answer.return_value
    machine.hardware.cache_clear()


def test_each_gpu_is_timed_under_its_own_name(tmp_path, monkeypatch):
    listing = tmp_path / "nvidia-smi"
    listing.write_text("#!/bin/sh\nprintf 'NVIDIA A\\nNVIDIA B\\n'\n")
    listing.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    named = machine.hardware.__wrapped__  # which keeps no answer for other tests
    assert named("auto") == named("cuda") == named("cuda:0") == "NVIDIA A"
    assert named("cuda:1") == "NVIDIA B" and named("cuda:2") == named("cpu")


def test_a_processor_has_the_name_that_its_system_gives_it(tmp_path, monkeypatch):
    """On a Mac and on ARM under Linux /proc does not tell, and all of them would be one `arm` or `aarch64`."""
    for program, says in (("sysctl", "Apple M3"), ("lscpu", "Architecture: aarch64\nModel name:   Neoverse-V2\nThread(s): 1")):
        (tmp_path / program).write_text(f"#!/bin/sh\ncat <<END\n{says}\nEND\n")
        (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    named = machine.hardware.__wrapped__
    monkeypatch.setattr(machine.platform, "system", lambda: "Darwin")
    assert named("cpu") == named("auto") == "Apple M3"
    monkeypatch.setattr(machine.platform, "system", lambda: "Linux")
    monkeypatch.setattr(machine, "Path", lambda _: tmp_path / "nothing")
    assert named("cpu") == "Neoverse-V2"
    (tmp_path / "lscpu").write_text("#!/bin/sh\n")
    assert named("cpu") == (machine.platform.processor() or machine.platform.machine())


def test_peak_memory_is_in_bytes_on_every_system(monkeypatch):
    """A Mac counts it in bytes, Linux in KiB."""
    here = artefacts.peak_memory()
    status = Path("/proc/self/status").read_text()
    assert here == pytest.approx(1024 * int(status.partition("VmHWM:")[2].split()[0]), rel=0.05)
    monkeypatch.setattr(artefacts.sys, "platform", "darwin")
    assert 1024 * artefacts.peak_memory() == pytest.approx(here, rel=0.05)


def test_tuning_that_does_not_fit_in_memory_is_refused_before_any_job(small, place, monkeypatch):
    tuned = [*small, "quantization=best", "allocation=uniform"]
    monkeypatch.setattr(forecast.limits, "memory_limit", lambda: 100 << 20)
    local = execution.Settings()
    with pytest.raises(ValueError, match=r"quantization\.distill_steps=\d+: .* of memory, .*100\.00MiB; take experiment=fast"):
        execution.planned(tuned, local)
    (answer,) = sweeps.Sweep(local).launch([tuned])
    assert answer.status == JobStatus.FAILED and not list(place.iterdir()), "nothing was written"
    execution.planned(tuned, execution.Settings(profile="slurm"))
    execution.planned([*tuned, "quantization.distill_steps=0"], local)
    (place / "results" / studies.experiment(tuned).artefacts["quantization"].folder).mkdir(parents=True)
    execution.planned(tuned, local)  # its checkpoint is there


def test_a_study_takes_keys_of_the_groups_that_it_chooses(small, place, monkeypatch):
    """Of groups that nobody else chooses: in the default one there is no such key."""
    asked = []
    monkeypatch.setattr(execution, "run", lambda planned, experiments, settings: asked.append((planned, settings)) or 1)
    study = {"name": "mine", "caption": "", "base": ["pruning=pesf"], "experiments": ["quantization=rtn allocation=uniform"]}
    monkeypatch.setattr(studies, "load_study", lambda name: study)
    monkeypatch.setattr(plan, "load_study", lambda name: study)
    own = [o for o in small if not o.startswith(("quantization=", "allocation="))]
    with pytest.raises(SystemExit):
        command(monkeypatch, "study=mine", *own, "pruning.alpha=0.9", "hydra.launcher.jobs=3")
    planned, settings = asked[0]
    assert settings.jobs == 3
    assert {item.config["pruning"]["alpha"] for item in planned.artefacts.values() if item.stage == "pruning"} == {0.9}
    with pytest.raises(SystemExit, match=r"pruning\.beta=1: pruning=pesf has no key 'beta'"):
        command(monkeypatch, "study=mine", *own, "pruning.beta=1")


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("", "ended before its first word; what Snakemake says of its job is above"),
        ("model a: started\n", "killed, for want of memory if nobody did it; the last that it said was: model a: started"),
        ("model a: started\nmoepress: seed=x: a number\n", "seed=x: a number (the log: "),
        ("Traceback (most recent call last)\nKeyError: 'x'\n", "KeyError: 'x' (the log: "),
    ],
)
def test_why_an_artefact_is_missing(said, why, tmp_path):
    log = tmp_path / "logs" / "model" / "a-1.log"
    log.parent.mkdir(parents=True)
    log.write_text(said)
    assert why in execution.failure(tmp_path, ["model/a-1"])
