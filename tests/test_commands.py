"""moepress results, compare, show and clean, on an experiment made by the real stages."""

import csv
import io
import json
import shutil
import sys

import numpy as np
import pytest

from moepress import cli, execution, lookup, studies
from moepress.commands import clean, compare, results, show
from moepress.export import export
from moepress.report import paired, reading


@pytest.fixture
def said(capsys):
    """Runs a command and returns what it prints."""

    def run(command, *arguments):
        command.main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return run


def test_results_prints_the_newest_report(made, said):
    _, report, _ = made
    where = f"--results={report.parent.parent}"
    lines = said(results, where).splitlines()
    assert lines[0].split()[:2] == ["run", "bits/weight"] and lines[-1] == str(report)
    assert [line.split()[0] for line in lines[1:-1]] == ["16bit", "qesc-pmq-2.5"]
    for name in (report, report.name, report.name[-12:], report.name[-12:-4], "qesc-pmq-2.5"):
        assert said(results, name, where).splitlines()[-1] == str(report)


def test_results_as_csv_filtered_and_sorted(made, said):
    report = made[1]
    rows = list(csv.DictReader(io.StringIO(said(results, report, "--csv", "--sort", "bits_nominal"))))
    with (report / "runs.csv").open() as file:
        whole = list(csv.DictReader(file))
    assert rows[0].keys() == whole[0].keys() and [row["run"] for row in rows] == ["qesc-pmq-2.5", "16bit"]
    assert float(rows[0]["ppl_mean"]) == float(whole[1]["ppl_mean"])
    table = said(results, report, "--filter", "bits_nominal<=3", "--filter", "method=qesc")
    assert "qesc-pmq-2.5" in table and "16bit " not in table
    down = said(results, report, "--sort", "bits_nominal", "--descending").splitlines()
    assert down[1].startswith("16bit")
    for wrong, message in ((["--sort", "x"], "--sort x: no such column; there is run, "), (["--filter", "a"], "COLUMN=VALUE")):
        with pytest.raises(ValueError, match=message):
            results.main([str(report), *wrong])
    with pytest.raises(ValueError, match="method=rtn: no row"):
        results.main([str(report), "--filter", "method=rtn"])


def test_compare_is_the_paired_statistics_and_what_differs(made, said):
    report = made[1]
    where = f"--results={report.parent.parent}"
    text = said(compare, "qesc-pmq-2.5", "16bit", where)
    reference, run = reading.load(lookup.report(None, report.parent.parent).described["config"]["runs"], report.parent.parent)
    above = paired.increase([run], [reference], run.domains[0])
    low, high = above.interval
    (line,) = [line for line in text.splitlines() if line.strip().startswith("nats per token")]
    assert f"{above.value:+.4f}" in line and f"{low:+.4f} to {high:+.4f}" in line
    assert ("within noise" in line) == above.is_noise
    assert f"A: qesc-pmq-2.5, seed 0, of {report}" in text
    differing, _ = text.split("what differs")[1].split("\n\n")
    assert "quantization.method" in differing and "allocation.bits" in differing and "model." not in differing
    evaluation, folder = run.keys["evaluation"], report.parent.parent / run.artefacts["quantization"]
    assert said(compare, evaluation, "16bit", where) == said(compare, folder, "16bit", where) == text
    assert "nothing differs" in said(compare, report, "qesc-pmq-2.5", where)
    assert "the same" in said(compare, report, "qesc-pmq-2.5", where)
    with pytest.raises(ValueError, match=r"rtn: no report has a run of this name.*16bit, qesc-pmq-2\.5"):
        compare.main(["rtn", "16bit", where])


def test_show_tells_the_tree_and_its_cost(made, said):
    report = made[1]
    place = report.parent.parent
    (evaluation,) = place.glob("evaluation/qesc-*")
    text = said(show, evaluation.name[-12:], f"--results={place}")
    for stage in ("corpus", "model", "calibration", "statistics", "allocation", "quantization"):
        (folder,) = place.glob(f"{stage}/*-????????????")
        assert f"{stage}/{folder.name}" in text
    above = lookup.StoredArtefact(place, f"evaluation/{evaluation.name}").upstream()
    assert len(above) == 8, "with the 16-bit model's evaluation"
    seconds = sum(json.loads((place / name / "provenance.json").read_text())["seconds"] for name in above)
    assert f"altogether {show.duration(seconds)}, " in text and "8 artefacts" in text
    assert "versions" in text and "num_blocks: 4" in text
    told = [line for line in said(show, report, f"--results={place}").splitlines() if "statistics/" in line]
    assert len([line for line in told if "(above)" not in line]) == 1, "each is told of once"
    with pytest.raises(ValueError, match="abcdef: no artefact of"):
        show.main(["abcdef", f"--results={place}"])


def test_small_differences_are_told_from_none_and_zero_has_no_sign():
    for (value, stderr), expected in {
        (0.0, 0.0): ("0.0000", "0.0000 to 0.0000"),
        (-2e-5, 0.01): ("0.0000", "-0.0223 to +0.0223"),
        (-2e-5, 1e-6): ("-0.0000200", "-0.0000222 to -0.0000178"),
        (0.5, np.nan): ("+0.5000", "unknown: one block only"),
    }.items():
        assert compare.numbers_of(paired.Difference(value, stderr, 10)) == expected


def test_runs_are_found_by_name(made, said, copied):
    report = made[1]
    where = f"--results={report.parent.parent}"
    assert said(results, "16bit", where).splitlines()[-1] == str(report), "the newest report that has it"
    text = said(show, "16bit", where)
    assert text.splitlines()[0].startswith(str(report.parent.parent / "evaluation" / "16bit-"))
    (folder,) = report.parent.parent.glob("evaluation/qesc-*")
    assert said(show, "qesc-pmq-2.5", where).splitlines()[0] == str(folder)
    assert said(results, folder.name[-12:], where).splitlines()[-1] == str(report)
    with pytest.raises(ValueError, match=r"qesc-pmq-2: no artefact .* no run .*did you mean qesc-pmq-2\.5\?"):
        show.main(["qesc-pmq-2", where])
    place, _ = copied  # where another report has another run of the same name
    (other,) = place.glob("report/*")
    twin = other.with_name(f"twin-{'0' * 12}")
    shutil.copytree(other, twin)
    text = (twin / "config.yaml").read_text()
    (sixteen,) = place.glob("evaluation/16bit-*")
    (twin / "config.yaml").write_text(text.replace(folder.name, sixteen.name))
    with pytest.raises(
        ValueError, match=r"several runs are called so.*evaluation/.* of .*report/.*; evaluation/.* of .*report/"
    ):
        lookup.artefact("qesc-pmq-2.5", place)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plann"], r"'plann': no such command \(did you mean plan\?\); there is plan, results, .*a key needs its `=`"),
        (["run"], r"'run': no such command; there is plan"),
        (["allocation.budget=3MB", "plan"], r"'plan' is a command, which comes first: moepress plan allocation\.budget=3MB"),
        (["--multirun", "quantizatoin"], r"'quantizatoin': no such command"),
        (["quantization"], r"'quantization': a group needs a value"),
        (["plan", "model.path"], r"'model\.path': a key needs a value"),
        (["study=default", "experiment=fast"], r"experiment=fast beside study=default: its experiments choose for themselves"),
        (["study=defalt"], r"study=defalt: no such file"),
    ],
)
def test_words_that_are_no_keys(arguments, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["moepress", *arguments])
    with pytest.raises(SystemExit, match=message):
        cli.main()


def test_numbers_are_compared_and_published_as_they_were_left(copied):
    place, _ = copied
    where = f"--results={place}"
    (evaluation,), (report,), (checkpoint,) = (
        place.glob(f"{name}-????????????") for name in ("evaluation/qesc*", "report/*", "quantization/*")
    )
    for damaged, refused in (
        (evaluation / "blocks.parquet", lambda: compare.main(["qesc-pmq-2.5", "16bit", where])),
        (report / "config.yaml", lambda: compare.main(["qesc-pmq-2.5", "16bit", where])),
        (report / "runs.csv", lambda: export(checkpoint, place / "out", report)),
    ):
        whole = damaged.read_bytes()
        damaged.write_bytes(whole.replace(whole[-9:], whole[-9:-1] + b"~"))
        with pytest.raises(ValueError, match=rf"{damaged}: altered, .*; `moepress verify"):
            refused()
        damaged.write_bytes(whole)


def test_a_damaged_record_is_named_with_a_way_out(copied):
    place, _ = copied
    (report,) = place.glob("report/*-????????????")
    for name, content in (("provenance.json", ""), ("provenance.json", "[1]"), ("config.yaml", "a: [")):
        whole = (report / name).read_bytes()
        (report / name).write_text(content)
        for command in (show, results):
            with pytest.raises(
                ValueError, match=rf"{report / name}: (cannot be read|truncated).*; `moepress verify --results={place}`"
            ):
                command.main(["qesc-pmq-2.5", f"--results={place}"])
        (report / name).write_bytes(whole)


@pytest.fixture
def copied(made, tmp_path, monkeypatch):
    """The results again, the overrides that made them, and a folder beside them that is nobody's to remove."""
    overrides, report, _ = made
    place = tmp_path / "results"
    shutil.copytree(report.parent.parent, place)
    outside = tmp_path / "outside-0123456789ab"
    outside.mkdir()
    (outside / "precious").write_text("x")
    (place / "model" / "linked-0123456789ab").symlink_to(outside)
    (place / "model" / "notes.txt").write_text("mine")
    (place / "quantization" / "old-0123456789ab.partial").mkdir()
    monkeypatch.setattr(clean.locks, "working_here", lambda: [])
    return place, [*(o for o in overrides[:-1] if not o.startswith(("quantization=", "allocation."))), f"paths.results={place}"]


def folders(place):
    return {str(path.relative_to(place)) for path in place.glob("*/*-????????????*") if path.is_dir()}


def test_clean_keeps_what_a_study_needs(copied, said, monkeypatch):
    place, overrides = copied
    overrides = [o for o in overrides if not o.startswith(("quantization=", "allocation="))]  # they would rule the study's
    before = folders(place)
    study = {"name": "s", "caption": "", "base": [], "experiments": ["quantization=rtn allocation=uniform allocation.bits=3"]}
    monkeypatch.setattr(studies, "load_study", lambda name: study)
    dry = said(clean, *overrides, "--study", "s", "--dry-run")
    assert folders(place) == before and "would be removed" in dry
    with pytest.raises(ValueError, match=r"nobody to ask here; --yes removes them"):
        monkeypatch.setattr(sys, "stdin", io.StringIO())
        clean.main([*overrides, "--study", "s"])
    assert folders(place) == before
    text = said(clean, *overrides, "--study", "s", "--yes")
    left = folders(place)
    assert {name.split("/")[0] for name in left} == {"model", "corpus", "evaluation", "latency"}
    assert all("16bit" in name for name in left if name.startswith(("evaluation", "latency")))
    assert all(str(place / name) in text for name in before - left)
    assert (place / "model" / "linked-0123456789ab" / "precious").read_text() == "x", "what lies elsewhere is left alone"
    assert (place / "model" / "notes.txt").exists() and not (place / "quantization" / "old-0123456789ab.partial").exists()
    assert not list((place / "tasks" / "quantization").glob("*")) and list((place / "tasks" / "model").glob("*"))


def test_clean_keeps_a_sweep_a_report_and_asks(copied, said, monkeypatch):
    place, overrides = copied
    before = folders(place)
    monkeypatch.setattr(studies, "load_study", lambda name: {"name": "s", "caption": "", "base": [], "experiments": []})
    monkeypatch.setattr(clean, "folders", lambda *found, own=clean.folders: own(*found) if found[2] else set())
    sweep = "quantization=qesc allocation.bits=2,2.5"
    assert "quantization/old" in said(clean, *overrides, "--study", "s", "--keep", sweep, "--dry-run")
    unneeded = clean.unneeded_paths(place, clean.needed_folders(["s"], overrides, [sweep], place)[0])
    assert {path.parent.name for path in unneeded} == {"quantization", "report"}, "another report than the sweep's"
    (report,) = place.glob("report/*")
    text = said(clean, *overrides, "--study", "s", "--keep", report.name, "--keep", sweep, "--dry-run")
    assert text.splitlines()[-1] == "1 artefacts, 0.00MiB: would be removed"

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdin", Terminal("no\n"))
    assert "nothing was removed" in said(clean, *overrides, "--study", "s")
    assert folders(place) == before


def test_what_a_killed_clean_left_goes_with_the_next_one(copied):
    place, _ = copied
    (kept,) = place.glob("calibration/*-????????????")
    left = kept.with_name(f".{kept.name}.removed")
    (left / "streams").mkdir(parents=True)
    known = {f"{path.parent.name}/{path.name}" for path in place.glob("*/*-????????????*")}
    assert clean.unneeded_paths(place, {name.removesuffix(".partial") for name in known}) == [left]
    clean.remove(kept, place)
    assert not kept.exists() and not left.exists(), "nor is it in the way of the same name"
    left.mkdir()
    clean.remove(left, place)
    assert not left.exists()


def test_clean_with_yes_wants_to_know_every_study(copied, monkeypatch):
    place, overrides = copied
    before = folders(place)

    def broken(name):
        raise ValueError("no such group")

    monkeypatch.setattr(studies, "load_study", broken)
    with pytest.raises(ValueError, match="with --yes nothing is removed while it is not known"):
        clean.main([*overrides, "--yes"])
    assert folders(place) == before


def test_the_command_knows_them(made, monkeypatch, capsys):
    for arguments, expected in (
        (["results", str(made[1])], "qesc-pmq-2.5"),
        (["results", "--help"], "--filter"),
        (["clean", "--help"], "--dry-run"),
        (["--help"], "moepress compare A B"),
        (["latency", "--help"], "mixtral-8x22b"),
        (["--cfg", "job"], "objective: ppl_mean"),
    ):
        monkeypatch.setattr(sys, "argv", ["moepress", *arguments])
        try:
            cli.main()
        except SystemExit as ended:
            assert not ended.code
        assert expected in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["moepress", "show", "nothing", f"--results={made[1].parent.parent}"])
    with pytest.raises(SystemExit, match=r"moepress: nothing: no artefact of .* has this folder, id or key"):
        cli.main()


def test_a_cell_of_runs_csv():
    assert [execution.value(text) for text in ("3", "3.5", "", "qesc")] == [3, 3.5, None, "qesc"]
    assert np.isnan(execution.value("nan"))
