"""The W&B mirror of an experiment made by the real stages, read back by W&B's own tool; and the dashboard's description."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from moepress import cli, integrity, plan, tracking
from moepress.artefacts import read_json
from moepress.commands import dashboard, sync
from moepress.composing import ROOT
from moepress.dag import STAGES
from moepress.lookup import StoredArtefact
from moepress.models.files import record
from moepress.schema.measuring import MIRRORED
from moepress.secrets import HIDDEN, values, without_secrets
from moepress.tracking import mirror, records
from wandb_server import Server

SETTINGS = {"project": "a-project", "entity": None, "upload": []}
KEY = "0f1e2d3c4b5a69788796a5b4c3d2e1f00f1e2d3c"
HOSTILE = {
    "WANDB_API_KEY": KEY,
    "HF_TOKEN": "hf_aZbYcXdWeVfUgThSiRjQkPlOm",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "DATABASE_PASSWORD": "correct horse battery staple",
    "WANDB_NOTES": "a note with hf_aZbYcXdWeVfUgThSiRjQkPlOm",
}


def test_every_stage_is_mirrored_but_for_parts_of_one():
    assert set(MIRRORED) == {*STAGES, "report"} - {"statistics_block"}


def run_mirror(report, mode="offline", settings=SETTINGS, env=None, **options):
    """`python -m moepress.tracking`, as the rule calls it, in an environment without login. Returns its note and its words."""
    note = report.parent.parent / "tracking" / mode / f"{report.name}.json"
    home = report.parent.parent.parent / "home"
    home.mkdir(exist_ok=True)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    clean |= {"HOME": str(home), "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", **(env or {})}
    command = [sys.executable, "-m", "moepress.tracking", str(report), str(note), json.dumps(settings)]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return read_json(note), done.stdout + done.stderr


def inspect(folder):
    """Every record of a run's log, by `wandb leet inspect --json`'s own program."""
    from wandb.util import get_core_path

    (path,) = folder.glob("run-*.wandb")
    command = [get_core_path(), "leet", "inspect", "--json", "--run-file", str(path.resolve()), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert found[0]["type"] == "header" and found[-1]["type"] == "exit" and found[-1]["exit"]["exit_code"] == 0
    return [(record["type"], record[record["type"]]) for record in found]


class Run:
    """What the server would make of one run's records."""

    def __init__(self, folder):
        self.folder, self.records = folder, inspect(folder)
        ((_, self.run),) = [record for record in self.records if record[0] == "run"]
        self.id, self.config = self.run["run_id"], self.run["config"]["update"]
        self.history = [item["item"] for kind, item in self.records if kind == "history"]
        self.summary = {}
        for kind, item in self.records:
            self.summary |= item.get("update", {}) if kind == "summary" else {}
        artifacts = [item for kind, item in self.records if kind == "artifact" and item["type"] != "run_table"]
        self.uses = {(a["name"], a["digest"]) for a in artifacts if a.get("use_after_commit")}
        self.makes = [a for a in artifacts if not a.get("use_after_commit")]
        self.files = [file["path"] for kind, item in self.records if kind == "files" for file in item["files"]]
        self.metrics = {item["name"]: item for kind, item in self.records if kind == "metric"}


def runs_of(results):
    """Id -> run, of all that lies there to be synced."""
    found = [Run(folder) for folder in sorted((results / "wandb").glob("offline-run-*"))]
    assert len({run.id for run in found}) == len(found), "one folder a run"
    return {run.id: run for run in found}


def bytes_of(folder):
    """Path -> bytes of every artefact."""
    stages = [path for path in folder.iterdir() if path.name not in ("wandb", "tracking")]
    return {path: path.read_bytes() for stage in stages for path in stage.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def mirrored(made, tmp_path_factory):
    """A copy of the experiment's results, mirrored under a hostile environment: the report's folder, the note and the runs."""
    place = tmp_path_factory.mktemp("a place") / "results"
    shutil.copytree(made[1].parent.parent, place, ignore=shutil.ignore_patterns("wandb", "tracking"))
    report = place / "report" / made[1].name
    before = bytes_of(place)
    repository = place.parent / "checkout"
    subprocess.run(["git", "init", "-q", str(repository)], check=True)
    remote = "https://someone:ghp_0123456789abcdefghijABCDEFGHIJ456789@github.com/someone/private.git"
    subprocess.run(["git", "-C", str(repository), "remote", "add", "origin", remote], check=True)
    note, said = run_mirror(report, env=HOSTILE, cwd=repository)
    assert note["complete"], said
    assert bytes_of(place) == before, "artefacts stay as they were"
    return report, note, runs_of(place)


def test_a_run_for_every_artefact_and_every_row(mirrored):
    report, note, runs = mirrored
    results = report.parent.parent
    described = StoredArtefact(results, f"report/{report.name}").described["config"]
    folders = {path.parent.relative_to(results) for path in results.glob("*/*/provenance.json")}
    stages = {path.name[-12:]: path.parts[0] for path in folders}
    assert {id: run.run["job_type"] for id, run in runs.items() if run.run["job_type"] != "experiment"} == stages
    rows = [run for run in runs.values() if run.run["job_type"] == "experiment"]
    assert {run.run["display_name"] for run in rows} == {"16bit", "qesc-pmq-2.5"} and len(described["runs"]) == len(rows)
    assert {run.run["run_group"] for run in runs.values()} == {"qesc-pmq-2.5"}
    assert {run.run["project"] for run in runs.values()} == {"a-project"}
    assert {entry["id"] for entry in note["runs"]} == runs.keys()


def test_config_and_summary_are_complete(mirrored, made):
    from moepress.dag import NOT_IN_KEY
    from moepress.studies import experiment

    left_out = {group: keys for group, keys in NOT_IN_KEY.items() if group != "quantization"}  # whose name is told

    report, _, runs = mirrored
    (own,) = [run for run in runs.values() if run.run["display_name"] == "qesc-pmq-2.5"]
    config = experiment(made[0]).config
    for group in ("calibration", "statistics", "allocation", "quantization", "evaluation", "latency"):
        expected = {name: value for name, value in config[group].items() if name not in left_out.get(group, ())}
        assert own.config[group] == expected, group
    assert own.config["seed"] == 0 and own.config["experiment"]["method"] == "qesc"
    with (report / "runs.csv").open() as file:
        row = list(csv.DictReader(file))[1]
    row.pop("keys")
    for name, text in row.items():
        if text == "":
            assert name not in own.summary
        else:
            value = own.summary[name]
            assert value == (text if isinstance(value, str) else pytest.approx(float(text))), name
    (stage,) = [run for run in runs.values() if run.run["job_type"] == "evaluation" and "qesc" in run.run["display_name"]]
    metrics = read_json(next(report.parent.parent.glob("evaluation/qesc-*/metrics.json")))
    assert stage.summary["selection_shift"] == metrics["selection_shift"] and stage.summary["seconds"] > 0
    assert stage.summary["domains"]["even"]["ppl"] == metrics["domains"]["even"]["ppl"]


def test_curves_have_the_layer_as_their_axis(mirrored):
    report, _, runs = mirrored
    diagnostics = read_json(next(report.parent.parent.glob("quantization/*/diagnostics.json")))["layers"]
    domains = read_json(next(report.parent.parent.glob("evaluation/qesc-*/metrics.json")))["domains"].values()
    shift = np.mean([domain["selection_shift_by_layer"] for domain in domains], axis=0)  # domains have as many blocks
    found = [run for run in runs.values() if run.run["display_name"] == "qesc-pmq-2.5"]
    found += [run for run in runs.values() if run.run["job_type"] == "quantization"]
    for run in found:
        by_layer = [row for row in run.history if "layer" in row]
        assert [row["_step"] for row in run.history] == list(range(len(run.history))), "no gaps, no duplicates"
        assert [row["layer"] for row in by_layer] == [row["layer"] for row in diagnostics]
        for name in ("output_error", "selection_shift", "router_loss"):
            assert [row[f"quantization/{name}"] for row in by_layer] == [row[name] for row in diagnostics]
            assert run.metrics[f"quantization/{name}"]["step_metric"] == "layer"
    assert [row["evaluation/selection_shift"] for row in found[0].history if "layer" in row] == pytest.approx(shift)


def test_tables_and_figures_are_media(mirrored):
    report, _, runs = mirrored
    page = runs[report.name[-12:]]
    names = {path.stem for path in (report / "figures").glob("*.png")}
    assert {f"figures/{name}.path" for name in names} <= page.summary.keys() and page.summary["runs._type"] == "table-file"
    assert page.summary["runs.nrows"] == 2
    assert all((page.folder / "files" / path).is_file() for path in page.files)
    (row,) = [run for run in runs.values() if run.run["display_name"] == "qesc-pmq-2.5"]
    with Image.open(row.folder / "files" / row.summary["allocation/bits.path"]) as picture:
        assert picture.width > 200 and len(picture.convert("RGB").getcolors(1 << 16)) > 2
    inside = report.parent.parent.resolve()
    staged = [entry["local_path"] for kind, item in page.records if kind == "artifact" for entry in contents(item)
              if "local_path" in entry]  # fmt: skip
    assert staged and all(Path(path).is_relative_to(inside) and Path(path).is_file() for path in staged), "to be sent later"


def contents(artifact):
    return artifact["manifest"]["contents"]


def test_lineage_by_reference(mirrored):
    """What a run uses is by name and digest what another run made; the graph is that of the DAG."""
    report, _, runs = mirrored
    results = report.parent.parent
    makers = {}
    for run in runs.values():
        assert len(run.makes) == (run.run["job_type"] != "experiment")
        for artifact in run.makes:
            makers[artifact["name"], artifact["digest"]] = run.id
            assert artifact["type"] == run.run["job_type"] and set(artifact["aliases"]) == {"latest", run.id}
            folder = results / run.config["artefact"]
            expected = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {".snakemake_timestamp"}
            assert {entry["path"] for entry in contents(artifact)} == expected
            for entry in contents(artifact):
                path = folder.resolve() / entry["path"]
                assert entry["ref"] == f"file://{path}" and int(entry["size"]) == path.stat().st_size
    for run in runs.values():
        used = {makers[name] for name in run.uses}
        if run.run["job_type"] == "experiment":
            assert used == {folder[-12:] for folder in run.config["artefacts"].values()}
        elif run.run["job_type"] != "report":
            assert used == {folder[-12:] for folder in run.config["inputs"].values()}
    assert len(runs[report.name[-12:]].uses) > 6


def test_the_order_of_sync_is_producers_first(mirrored):
    report, _, runs = mirrored
    generations = sync.waiting(report.parent.parent)
    order = {folder.name.rpartition("-")[2]: number for number, folders in enumerate(generations) for folder in folders}
    assert order.keys() == runs.keys()
    makers = {(a["name"], a["digest"]): run.id for run in runs.values() for a in run.makes}
    for run in runs.values():
        assert all(order[makers[used]] < order[run.id] for used in run.uses)


def test_again_and_from_another_study_nothing_is_doubled(mirrored, tmp_path):
    report = mirrored[0]
    shutil.copytree(report.parent.parent, tmp_path / "results")
    report = tmp_path / "results" / "report" / report.name
    place = report.parent.parent
    before = {path: path.stat().st_mtime_ns for path in place.glob("wandb/offline-run-*/*.wandb")}
    assert run_mirror(report)[0]["complete"]
    assert {path: path.stat().st_mtime_ns for path in place.glob("wandb/offline-run-*/*.wandb")} == before, "all there"

    # a mirror that was killed in the middle of a run: its folder is there, its note is not
    (id,) = (run.id for run in mirrored[2].values() if run.run["job_type"] == "statistics")
    (victim,) = place.glob(f"wandb/offline-run-*-{id}")
    (log,) = victim.glob("*.wandb")
    log.write_bytes(log.read_bytes()[:200])
    (place / "tracking/offline/runs" / f"{id}.json").unlink()
    # a sweep that shares the stages: its rows are its own, the artefacts' runs stay where they are
    text = (report / "config.yaml").read_text().replace("name: qesc-pmq-2.5\n  runs", "name: experiments\n  runs")
    (report / "config.yaml").write_text(text)
    provenance = {name: value for name, value in read_json(report / "provenance.json").items() if name != integrity.SEAL}
    provenance["files"]["config.yaml"] = record(report / "config.yaml")
    (report / "provenance.json").write_text(json.dumps(integrity.sealed(provenance)))
    assert run_mirror(report)[0]["complete"]
    after = runs_of(place)
    assert id in after and not victim.exists()
    new = {run.run["job_type"] for run in after.values() if run.run["run_group"] == report.name}
    assert new == {"statistics", "experiment", "report"}
    assert len(after) == len(mirrored[2]) + 2


def test_copies_where_they_are_asked_for(mirrored, tmp_path):
    report = mirrored[0]
    shutil.copytree(report.parent.parent, tmp_path / "results", ignore=shutil.ignore_patterns("wandb", "tracking"))
    report = tmp_path / "results" / "report" / report.name
    assert run_mirror(report, settings=SETTINGS | {"upload": ["quantization"]})[0]["complete"]
    runs = runs_of(report.parent.parent)
    (quantized,) = [run for run in runs.values() if run.run["job_type"] == "quantization"]
    for entry in contents(quantized.makes[0]):
        assert "ref" not in entry and Path(entry["local_path"]).resolve().is_relative_to(tmp_path.resolve())
    (model,) = [run for run in runs.values() if run.run["job_type"] == "model"]
    assert all("ref" in entry for entry in contents(model.makes[0]))
    makers = {(a["name"], a["digest"]) for a in quantized.makes}
    assert any(makers & run.uses for run in runs.values()), "copied or not, it is the same artifact to those that use it"


def test_no_secret_in_any_file(mirrored):
    """Of the artefacts, the logs, W&B's folders and its own logs in the user's home."""
    report = mirrored[0]
    place = report.parent.parent.parent
    found = {path: path.read_bytes() for path in place.rglob("*") if path.is_file() and "checkout" not in path.parts}
    assert any(path.suffix == ".wandb" for path in found) and any(path.name == "debug-internal.log" for path in found)
    for secret in [*HOSTILE.values(), "ghp_0123456789abcdefghijABCDEFGHIJ456789", "hf_aZbYcXdWeVfUgThSiRjQkPlOm"]:
        assert not [path for path, content in found.items() if secret.encode() in content], secret


def test_secrets_in_names_and_values_are_hidden(made, tmp_path, monkeypatch):
    """A configuration that holds what the environment says is secret, and what looks like a token or a password in a URL."""
    monkeypatch.setenv("MY_API_TOKEN", "tiny-secret-value")
    shutil.copytree(made[1].parent.parent, tmp_path / "results", ignore=shutil.ignore_patterns("wandb", "tracking"))
    report = tmp_path / "results" / "report" / made[1].name
    path = report / "config.yaml"
    path.write_text(path.read_text().replace("caption: ", "caption: from https://me:pass@host/x by tiny-secret-value, "))
    for name in ("runs.csv", "config.yaml"):
        path = report / name
        path.write_text(path.read_text().replace("run: qesc-pmq-2.5", "run: tiny-secret-value"))
    found, failures = records.of_report(StoredArtefact(tmp_path / "results", f"report/{report.name}"))
    assert not failures
    text = repr([(r.name, r.config, r.summary) for r in found])
    assert "tiny-secret-value" not in text and "me:pass" not in text and HIDDEN in text


def test_rows_of_one_name_are_both_mirrored(made):
    report = StoredArtefact(made[1].parent.parent, f"report/{made[1].name}")
    for run in report.described["config"]["runs"]:
        run["run"] = "the same"
    found, failures = records.of_report(report)
    rows = [record for record in found if record.job_type == "experiment"]
    assert len({record.id for record in rows}) == 2 and not failures
    assert all("quantization/starved_experts" in row for row in rows[1].curves)


@settings(max_examples=50)
@given(st.recursive(st.text() | st.integers() | st.none(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_without_secrets_changes_nothing_else(value):
    assert without_secrets(value, []) == without_secrets(without_secrets(value, []), [])
    if HIDDEN not in repr(without_secrets(value, [])):
        assert without_secrets(value, []) == value


def test_what_counts_as_a_secret():
    environment = {"A_TOKEN": "abcdefgh", "SSH_KEY": "short", "PATH": "/usr/local/bin", "tokenizers_parallelism": "false"}
    assert values(environment) == ["abcdefgh"]
    assert without_secrets({"xabcdefghx": ["abcdefgh", 1]}, ["abcdefgh"]) == {f"x{HIDDEN}x": [HIDDEN, 1]}


def test_online_without_network_or_login_says_so_and_goes_on(mirrored, tmp_path):
    report = mirrored[0]
    shutil.copytree(report.parent.parent, tmp_path / "results", ignore=shutil.ignore_patterns("wandb", "tracking"))
    report = tmp_path / "results" / "report" / report.name
    note, said = run_mirror(report, "online", env={"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": KEY})
    assert not note["complete"] and "Traceback" not in said
    assert re.search(r"moepress: tracking=online: W&B cannot be reached at http://127.0.0.1:9 .*same command tries again", said)
    assert not (tmp_path / "results" / "wandb").exists() and KEY not in said


def check_server(server, runs):
    """What a server has is what the offline runs hold: each run once, every step once, the DAG as lineage."""
    assert server.runs.keys() == runs.keys() and not server.unknown
    for id, run in runs.items():
        told = server.runs[id]
        assert (told["groupName"], told["jobType"]) == (run.run["run_group"], run.run["job_type"]) and told["exitcode"] == 0
        config = {name: item["value"] for name, item in json.loads(told["config"]).items() if name != "_wandb"}
        assert config == {name: value for name, value in run.config.items() if name != "_wandb" and value != {}}
        lines = server.history(id)
        assert [line["_step"] for line in lines] == [row["_step"] for row in run.history]
        for line, row in zip(lines, run.history, strict=True):
            curves = {name: value for name, value in row.items() if name.startswith(("layer", "quantization/", "evaluation/"))}
            assert curves.items() <= line.items()
        summary = json.loads(server.streams[id]["wandb-summary.json"][0])
        plain = {name: value for name, value in run.summary.items() if isinstance(value, int | float) and name[0] != "_"}
        plain = {name: value for name, value in plain.items() if "." not in name}
        assert plain.items() <= summary.items()
        assert set(run.files) <= server.files[id]
    for run in runs.values():
        for artifact in run.makes:
            found = server.artifacts[artifact["name"], artifact["digest"]]
            users = {user.id for user in runs.values() if (artifact["name"], artifact["digest"]) in user.uses}
            assert found["state"] == "COMMITTED" and found["users"] == users and found["maker"] == run.id


def test_online_each_run_is_there_once(mirrored, tmp_path):
    report = mirrored[0]
    shutil.copytree(report.parent.parent, tmp_path / "results", ignore=shutil.ignore_patterns("wandb", "tracking"))
    report = tmp_path / "results" / "report" / report.name
    with Server() as server:
        env = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
        note, said = run_mirror(report, "online", env=env)
        assert note["complete"] and KEY not in said, said
        check_server(server, mirrored[2])
        upserts = server.asked["UpsertBucket"]
        assert run_mirror(report, "online", env=env)[0]["complete"]
        assert server.asked["UpsertBucket"] == upserts, "all there: nothing is sent"
        shutil.rmtree(tmp_path / "results" / "tracking")  # as where the mirror was killed, or made from another machine
        assert run_mirror(report, "online", env=env)[0]["complete"]
        assert server.asked["UpsertBucket"] > upserts
        check_server(server, mirrored[2])


def test_offline_runs_sync_later_and_again(mirrored, tmp_path):
    """Once, nothing the second time; and a run that was made anew after it was sent doubles none of its steps."""
    place = tmp_path / "results"
    shutil.copytree(mirrored[0].parent.parent, place)
    with Server() as server:
        env = {**os.environ, "WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY, "HOME": str(tmp_path)}
        env["PYTHONPATH"] = str(ROOT / "src")

        def send():
            command = [sys.executable, "-m", "moepress", "sync", f"--results={place}"]
            done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            assert {path.name for path in tmp_path.iterdir()} <= {"results", "home", ".cache", ".config"}, "nothing beside"
            return done.stdout

        send()
        check_server(server, mirrored[2])
        assert "no run waits to be sent" in send()
        anew = [id for id, run in mirrored[2].items() if run.run["job_type"] in ("quantization", "experiment")]
        for id in anew:
            (place / "tracking" / "offline" / "runs" / f"{id}.json").unlink()
        assert run_mirror(place / "report" / mirrored[0].name)[0]["complete"]
        assert {folder.name.rpartition("-")[2] for paths in sync.waiting(place) for folder in paths} == set(anew)
        send()
        check_server(server, mirrored[2])


def test_a_mirror_that_fails_does_so_alone(mirrored, tmp_path):
    """An artefact that is damaged or gone: the others are mirrored, the exit code is 0, the next time it is tried again."""
    report = mirrored[0]
    shutil.copytree(report.parent.parent, tmp_path / "results", ignore=shutil.ignore_patterns("wandb", "tracking"))
    report = tmp_path / "results" / "report" / report.name
    shutil.rmtree(next((tmp_path / "results").glob("calibration/*")))  # of what was removed since there is no run
    next((tmp_path / "results").glob("allocation/*/allocation.json")).unlink()
    note, said = run_mirror(report)
    assert not note["complete"] and "allocation.json" in note["why"] and "tries again" in said
    mirrored_now = runs_of(tmp_path / "results")
    kinds = {run.run["job_type"] for run in mirrored_now.values()}
    assert {"quantization", "evaluation", "report"} <= kinds and not {"calibration", "allocation"} & kinds


def test_the_next_run_of_the_command_tries_again(made, tmp_path):
    overrides = [o for o in made[0] if not o.startswith("paths.results")] + [f"paths.results={tmp_path}"]
    planned = plan.for_overrides([*overrides, "tracking=offline", "tracking.project=other"])
    note = Path(planned.targets[1])
    asked = json.loads(planned.tracking)
    assert note.parent.name == "offline" and asked == SETTINGS | {"project": "other"}
    for told, is_kept in (
        ({"complete": True, "settings": asked}, True),
        ({"complete": False, "settings": asked}, False),
        ({"complete": True, "settings": SETTINGS}, False),
    ):
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(told))
        plan.for_overrides([*overrides, "tracking=offline", "tracking.project=other"])
        assert note.exists() == is_kept
    tracking.drop_stale(tmp_path / "none.json", asked)


@pytest.mark.parametrize(
    "override, message",
    [
        ("tracking.project=a/b", "tracking.project='a/b': a W&B project's name"),
        ("tracking.upload=[weights]", "tracking.upload='weights': stages, of corpus, model"),
    ],
)
def test_settings_are_checked(override, message):
    from moepress.config import values

    with pytest.raises(ValueError, match=re.escape(message)):
        values([override])


def test_the_dashboard_shows_what_is_mirrored(mirrored):
    """The workspace as W&B is sent it: its panels name only metrics, media and columns that the runs have."""
    from moepress.tracking import workspace

    report, _, runs = mirrored
    section = workspace.specification(workspace.build("us", "a-project", "qesc-pmq-2.5"))["spec"]["section"]
    (runset,) = section["runSets"]
    filters = [(f["key"]["name"], f["op"], f["value"]) for f in runset["filters"]["filters"]]
    assert filters == [("jobType", "IN", ["experiment", "report"]), ("group", "=", "qesc-pmq-2.5")]
    shown = [run for run in runs.values() if run.run["job_type"] in ("experiment", "report")]
    (row,) = [run for run in shown if run.run["display_name"] == "qesc-pmq-2.5"]
    page = runs[report.name[-12:]]
    kinds = set()
    for panel in (panel for part in section["panelBankConfig"]["sections"] for panel in part["panels"]):
        kinds.add(panel["viewType"])
        config = panel["config"]
        if panel["viewType"] == "Scatter Plot":
            for axis in (config["xAxis"], config["yAxis"]):
                name = axis.removeprefix("summary:")
                assert name in row.summary or name == "acc_mean"  # without tasks there is none
        elif panel["viewType"] == "Run History Line Plot":
            assert config["xAxis"] == "layer" and all(name in row.metrics for name in config["metrics"])
        elif panel["viewType"] == "Bar Chart":
            assert all(name in row.summary for name in config["metrics"])
        elif panel["viewType"] == "Media Browser":
            assert all(f"{key}.path" in row.summary | page.summary for key in config["mediaKeys"])
    assert kinds == {"Scatter Plot", "Run History Line Plot", "Media Browser", "Weave", "Bar Chart"}
    assert '"val": "runs"' in json.dumps(section) and "runs.nrows" in page.summary
    for column in runset["runFeed"]["columnOrder"]:
        kind, name = column.split(":")
        if kind == "config":
            value = row.config
            for part in name.replace(".value", "", 1).split("."):
                value = value[part]
        elif kind == "summary":
            assert name in row.summary or name == "acc_mean"
    everything = workspace.specification(workspace.build("us", "a-project", None))["spec"]["section"]["runSets"][0]
    assert [f["key"]["name"] for f in everything["filters"]["filters"]] == ["jobType"]


def test_the_dashboard_is_made_once_and_then_updated(mirrored, tmp_path):
    (tmp_path / "results").mkdir()
    command = [sys.executable, "-m", "moepress", "dashboard", "a-study", "--project=a-project"]
    with Server() as server:
        env = {**os.environ, "WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY, "HOME": str(tmp_path)}
        env["PYTHONPATH"] = str(ROOT / "src")

        def ask():
            done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
            assert done.returncode == 0 and not server.unknown, done.stderr
            return done.stdout.strip()

        address = ask()
        assert address.startswith(f"{server.url}/me/a-project?nw=") and ask() == address
        ((name, view),) = server.views.items()
        panels = [
            panel for part in json.loads(view["spec"])["section"]["panelBankConfig"]["sections"] for panel in part["panels"]
        ]
        assert len(panels) > 15 and view["displayName"] == "moepress: a-study"
        del server.views[name]  # by somebody at W&B
        assert ask() != address and len(server.views) == 1


def test_dashboard_and_sync_without_network_say_so_and_write_nothing(mirrored, monkeypatch, tmp_path, capsys):
    report = mirrored[0]
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    before = sorted(report.parent.parent.rglob("*"))
    command = [sys.executable, "-m", "moepress"]
    where = f"--results={report.parent.parent}"
    env = {**os.environ, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": KEY, "PYTHONPATH": str(ROOT / "src")}
    for arguments in (["dashboard", "qesc-pmq-2.5", where], ["sync", where]):
        done = subprocess.run([*command, *arguments], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith("moepress: W&B cannot be reached at http://127.0.0.1:9 (")
    assert sorted(report.parent.parent.rglob("*")) == before
    sync.main([where, "--dry-run"])
    assert len(capsys.readouterr().out.splitlines()) == len(mirrored[2])
    dashboard.main(["qesc-pmq-2.5", where, "--print", "--entity=us"])
    assert json.loads(capsys.readouterr().out)["entity"] == "us"
    assert {"sync", "dashboard"} <= cli.COMMANDS.keys() and mirror.NotReachable.__base__ is ValueError
