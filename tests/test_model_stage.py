"""The model stage: references with hashes, and models that cannot be had."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import write_model
from moepress.models import hub
from moepress.models.folders import locate
from moepress.stages import model


def test_a_reference_names_and_hashes_every_file(model_folder, tmp_path):
    model.refer(model_folder, tmp_path)
    found = json.loads((tmp_path / "reference.json").read_text())
    assert locate(tmp_path) == model_folder and found["family"] == "mixtral" and found["dtype"] == "bfloat16"
    digest = hashlib.sha256((model_folder / "model.safetensors").read_bytes()).hexdigest()
    assert found["files"]["model.safetensors"] == digest


def test_nan_anywhere_is_found_before_anything_is_made(tmp_path):
    folder = write_model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.inf
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.safetensors: the tensor model\.norm\.weight holds NaN or infinite"):
        model.refer(folder, tmp_path)
    assert not (tmp_path / "reference.json").exists()


def test_what_is_downloaded_of_a_hub_model(monkeypatch):
    """The hub's patterns match across folders, in which some repositories keep their weights in another form once more."""
    from huggingface_hub.utils import filter_repo_objects

    asked = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **settings: asked.update(settings) or "folder")
    hub.download("org/name", "main")
    files = ["config.json", "chat_template.jinja", "model-00001-of-00002.safetensors", "README.md"]
    others = ["original/config.json", "original/model.safetensors", "metal/model.bin", "pytorch_model.bin"]
    patterns = {name: asked[name] for name in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects([*files, *others], **patterns)) == files


@pytest.mark.parametrize("model_id", ["nobody/nothing-of-this-name", "not a valid id"])
def test_hub_models_that_cannot_be_had(monkeypatch, model_id):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=rf"model\.id='{model_id}' .*could not be fetched.*model=local"):
        hub.download(model_id, "main")
