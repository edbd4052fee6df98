"""A layer at a time against the whole model; damaged checkpoints are refused by file and tensor."""

import errno
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import write_model
from moepress.models import files, folders
from moepress.models.experts import StoredExperts
from moepress.models.streaming import ModelStream
from moepress.models.streams import Streams


def test_shards_read_like_one_file(model_folder, tmp_path):
    tensors = load_file(model_folder / "model.safetensors")
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file, {"format": "pt"})
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text((model_folder / "config.json").read_text())
    whole, sharded = ModelStream(model_folder).layer_tensors(1), ModelStream(tmp_path).layer_tensors(1)
    assert whole.keys() == sharded.keys() and all(torch.equal(whole[n], sharded[n]) for n in whole)
    name = "model.layers.1.self_attn.q_proj.weight"
    (other,) = set(halves) - {index["weight_map"][name]}
    index["weight_map"][name] = other
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json: says that .* holds .*q_proj.*, but it does not"):
        ModelStream(tmp_path)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"index names b\.safetensors, which is not there"):
        ModelStream(tmp_path)


def test_one_layer_is_in_memory_at_a_time(model_folder):
    """What went before has no weights any more, its experts' neither, whoever still holds it."""
    stream, before = ModelStream(model_folder), []
    for _, layer in stream.layers():
        assert not any(tensor.is_meta for tensor in layer.state_dict().values())
        for old in before:
            assert all(tensor.is_meta for tensor in old.state_dict().values())
            assert not any(module.weights for module in old.modules() if isinstance(module, StoredExperts))
        before.append(layer)
    assert len(before) == 2 and all(isinstance(module, torch.nn.Identity) for module in stream.body.layers)


def test_damage_is_named(tmp_path):
    folder = write_model(tmp_path / "model", layers=1)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    less = {k: v for k, v in tensors.items() if not k.endswith("experts.2.w3.weight")}
    save_file(less, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks the tensor model\.layers\.0\.block_sparse_moe\.experts\.2\.w3\.weight"):
        ModelStream(folder).layer(0)
    less = {k: v for k, v in tensors.items() if ".experts.2." not in k}
    save_file(less, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"layer 0 lacks expert 2, config\.json says 4 experts"):
        ModelStream(folder)
    odd = {k: v.to(torch.int8) if k == "model.layers.0.self_attn.k_proj.weight" else v for k, v in tensors.items()}
    save_file(odd, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.safetensors: model\.layers\.0\.self_attn\.k_proj\.weight is stored as I8"):
        ModelStream(folder).layer(0)
    save_file(tensors, path, {"format": "pt"})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        ModelStream(folder)
    with pytest.raises(ValueError, match=r"model\.safetensors: .* bytes, its header says"):
        files.entries(folder)


def test_fingerprint_sees_all_that_decides_what_the_model_does(tmp_path):
    folder = write_model(tmp_path / "model", layers=1)
    first = folders.fingerprint(folder)
    assert folders.fingerprint(folder) == first
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    second = folders.fingerprint(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert len({first, second, folders.fingerprint(folder)}) == 3


def test_streams_go_on_from_the_last_whole_layer(tmp_path):
    streams = Streams(tmp_path, ("x", "y"), (2, 3, 4))
    streams["x"].fill_(1), streams.next("x").fill_(2), streams["y"].fill_(3), streams.next("y").fill_(4)
    streams.scratch("m").fill_(9)
    again = Streams(tmp_path, ("x", "y"), (2, 3, 4))
    assert again.layer == 0 and (again["x"] == 1).all() and (again["y"] == 3).all(), "not advanced: the layer is done again"
    streams.advance()
    again = Streams(tmp_path, ("x", "y"), (2, 3, 4))
    assert again.layer == 1 and (again["x"] == 2).all() and (again["y"] == 4).all()
    assert not (tmp_path / "x-0.bin").exists(), "what no layer reads is not kept"


def test_a_full_disk_is_an_error_and_no_crash(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"x-0\.bin.*No space left|No space left.*x-0\.bin"):
        Streams(tmp_path, ("x",), (2, 3, 4))["x"]
