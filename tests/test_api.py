"""moepress.compress and out=: the command's stages, keys and errors, from Python."""

import errno
import shutil
import sys

import pytest
import torch

import moepress
from conftest import SMALL
from moepress import api, cli, export, plan
from moepress.composing import override_value
from moepress.config import values


@pytest.fixture(scope="module")
def settings(text_folder):
    """Of a small experiment, as keywords."""
    found = {key.replace(".", "__"): value for key, _, value in (override.partition("=") for override in SMALL)}
    fractions = {"train": 0.6, "calibration": 0.2, "test": 0.2}
    found |= {"corpus": "local", "corpus__path": str(text_folder), "corpus__fractions": fractions}
    return {key: int(value) if str(value).isdigit() else value for key, value in found.items()}


@pytest.fixture
def place(tmp_path_factory, monkeypatch):
    """A working folder that is not the checkout, shared by the tests here."""
    folder = tmp_path_factory.getbasetemp() / "an api place"
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("text", ["a/b-c.d", "/with a space/x", "it's", 'say "x"', "ends\\", "a,b", "x=y", "3GiB", "modèle"])
def test_text_passes_through_hydras_grammar(text):
    found = values(["model=local", f"model.path={override_value(text)}"])
    assert found["model"]["path"] == text


def test_other_values_pass_through_hydras_grammar():
    given = {
        "corpus.fractions": {"train": 0.5, "calibration": 0.25, "test": 0.25},
        "evaluation.domains": ["bible", "python"],
        "calibration.domains": None,
        "pruning": "pesf",
        "pruning.renormalize": False,
        "pruning.alpha": 1e-05,
    }
    found = values([f"{key}={override_value(value)}" for key, value in given.items()])
    assert found["corpus"]["fractions"] == given["corpus.fractions"]
    assert (found["evaluation"]["domains"], found["calibration"]["domains"]) == (["bible", "python"], None)
    assert (found["pruning"]["renormalize"], found["pruning"]["alpha"]) == (False, 1e-05)


def test_a_model_is_a_folder_an_id_or_the_small_one(model_folder, tmp_path, monkeypatch):
    assert api.model_overrides("tiny") == {"model": "tiny"}
    assert api.model_overrides(model_folder) == {"model": "local", "model.path": str(model_folder)}
    assert api.model_overrides("org/name-1.5") == {"model": "hub", "model.id": "org/name-1.5"}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert api.model_overrides("org/name") == {"model": "local", "model.path": "org/name"}
    assert api.model_overrides("/data/nothing")["model"] == "local"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"budget": "1KiB"}, r"allocation\.budget=1KiB: no allocation fits; this model takes from .*MiB"),
        ({"allocation__bitz": 3}, r"bitz.*keys of allocation"),
        ({"study": "default"}, r"study='default': compress takes one experiment"),
        ({"hydra__launcher__profile": "slurm"}, r"hydra\.launcher\.profile=slurm: of the `moepress` command alone"),
        ({"out": "there", "quantization": "none"}, r"out=there: quantization=none makes no checkpoint"),
    ],
)
def test_bad_values_are_refused_before_anything_is_written(
    model_folder, settings, place, tmp_path, monkeypatch, given, message
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        moepress.compress(model_folder, **settings | given)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_model(place):
    with pytest.raises(ValueError, match=r"model\.path='/data/nothing': no such folder"):
        moepress.compress("/data/nothing")


def test_a_model_without_a_tokenizer_is_refused_before_it_is_read(model_folder, settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = shutil.copytree(model_folder, tmp_path / "model")
    (model / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"model\.path='.*/model': no tokenizer\.json in it; save"):
        moepress.compress(model, **settings)
    assert not (tmp_path / "results").exists()


def test_compress_does_what_the_command_does(model_folder, settings, place, capfd, monkeypatch):
    given = settings | {"quantization": "rtn", "allocation": "uniform", "latency__repeats": 0}
    found = moepress.compress(model_folder, out=place / "copy", budget="0.2MiB", **given)
    assert found.report.joinpath("index.html").is_file() and found.row["method"] == "rtn"
    assert found.row["loaded_bytes"] == found.row["predicted_loaded_bytes"] + 64, "two float32 vectors for rotary positions"
    everything = sum(path.stat().st_size for path in found.folder.iterdir())
    assert found.row["predicted_folder_bytes"] == pytest.approx(everything, rel=0.01)
    assert everything <= 0.2 * 2**20
    assert found.model(torch.tensor([[1, 2, 3]])).logits.isfinite().all() and found.tokenizer("bits").input_ids
    model, _ = moepress.load(place / "copy")
    assert torch.equal(model(torch.tensor([[1, 2, 3]])).logits, found.model(torch.tensor([[1, 2, 3]])).logits)
    assert "Perplexity" in (place / "copy" / "README.md").read_text(), "the card has what was measured"

    # the command finds all of it, and its last line stays the report
    capfd.readouterr()
    lines = [f"{key.replace('__', '.')}={override_value(value)}" for key, value in given.items()]
    command = ["moepress", "model=local", f"model.path={model_folder}", "allocation.budget=0.2MiB", "out=other", *lines]
    monkeypatch.setattr(sys, "argv", command)
    cli.main()
    said = capfd.readouterr()
    assert "everything is computed already" in said.err and "a copy to publish: other" in said.err
    assert said.out.splitlines()[-1] == str(found.report)
    assert (place / "other" / "config.json").is_file()

    # where it cannot be written after all, it is `out` that is named
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export, "place", full)
    monkeypatch.setattr(sys, "argv", [*command[:4], "out=third", *command[5:]])
    with pytest.raises(SystemExit, match=r"moepress: out=third: cannot be written \(.*No space left.* is computed is kept"):
        cli.main()
    assert "Error executing job" not in capfd.readouterr().err


def test_a_checkpoint_that_was_deleted_is_computed_again(model_folder, settings, place):
    given = settings | {"quantization": "rtn", "allocation": "uniform", "latency__repeats": 0}
    found = moepress.compress(model_folder, budget="0.2MiB", **given)
    before = {path.name: path.read_bytes() for path in found.folder.glob("*.safetensors")}
    shutil.rmtree(found.folder)
    again = moepress.compress(model_folder, budget="0.2MiB", out=place / "another", **given)
    assert again.report == found.report and (place / "another" / "config.json").is_file()
    assert before == {path.name: path.read_bytes() for path in again.folder.glob("*.safetensors")}


def test_an_out_that_is_taken_is_refused_before_the_run(model_folder, settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    for out, message in (
        ("mine", r"mine: not empty, and no export of this checkpoint"),
        ("file", "file: is a file"),
        ("file/below", r"file/below: cannot be made, for .*/file is no folder that can be written; give another folder"),
    ):
        with pytest.raises(ValueError, match=message):
            moepress.compress(model_folder, out=out, **settings)
    assert not (tmp_path / "results").exists()


def test_a_dry_run_is_told_as_such(model_folder, settings, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    lines = [f"{key.replace('__', '.')}={override_value(value)}" for key, value in settings.items()]
    command = ["moepress", "model=local", f"model.path={model_folder}", *lines, "hydra.launcher.arguments=[--dry-run]"]
    monkeypatch.setattr(sys, "argv", command)
    cli.main()
    assert "asked for something else than a run" in capfd.readouterr().err


def test_a_stage_that_fails_names_its_log(model_folder, settings, place):
    with pytest.raises(RuntimeError, match=r"calibration\.num_sequences=400.*\(the log: results/logs/calibration/.*\.log\)"):
        moepress.compress(model_folder, **settings | {"calibration__num_sequences": 400})


def test_out_is_refused_where_there_are_many_checkpoints(place, monkeypatch, capsys):
    for arguments in (["study=default", "out=there"], ["--multirun", "out=there", "seed=0,1"]):
        monkeypatch.setattr(sys, "argv", ["moepress", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert "out=there: a s" in str(ended.value) + capsys.readouterr().err
    with pytest.raises(ValueError, match="out=there: snakemake makes the results"):
        plan.from_snakemake({"overrides": "out=there"})
    with pytest.raises(ValueError, match=r"hydra\.launcher\.jobs=3: of the `moepress` command alone"):
        plan.from_snakemake({"overrides": "hydra.launcher.jobs=3"})
