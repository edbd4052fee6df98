"""A layer at a time against the whole model; damaged checkpoints are refused by file and tensor."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import write_model
from moepress.inference.checkpoint import load
from moepress.models import families
from moepress.models.streaming import ModelStream, load_state, save_state
from moepress.quantization import size
from moepress.quantization.qesc import block_output

TOKENS = torch.randint(1, 250, (3, 20), generator=torch.Generator().manual_seed(0))


def test_the_walk_is_the_model(model_folder):
    """Our residual, block input, routing and block output reproduce every layer of transformers' own forward."""
    model, _ = load(model_folder, "cpu")
    stream = ModelStream(model_folder)
    x, positions = stream.embed(TOKENS), stream.positions(TOKENS.shape[1])
    with torch.inference_mode():
        expected = model.model(TOKENS, output_hidden_states=True).hidden_states
        for index, layer in stream.layers():
            assert torch.equal(x, expected[index])
            residual, m = stream.attend(layer, x, positions)
            _, weights, indices = stream.route(layer, m.flatten(0, 1))
            from_triple = stream.module(layer, "experts")(m.flatten(0, 1), indices, weights).view_as(m)
            x = residual + block_output(stream.module(layer, "moe"), m)
            assert torch.allclose(residual + from_triple, x, atol=1e-6)
        assert torch.equal(model.model.norm(x), expected[-1])


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
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"index names b\.safetensors, which is not there"):
        ModelStream(tmp_path)


def test_damage_is_named(tmp_path):
    folder = write_model(tmp_path / "model", layers=1)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    less = {k: v for k, v in tensors.items() if not k.endswith("experts.2.w3.weight")}
    save_file(less, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks the tensor model\.layers\.0\.block_sparse_moe\.experts\.2\.w3\.weight"):
        ModelStream(folder).layer(0)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        ModelStream(folder)
    with pytest.raises(ValueError, match=r"model\.safetensors: .* bytes, its header says"):
        size.tensor_shapes(folder)


def test_fingerprint_sees_weights_and_config(tmp_path):
    folder = write_model(tmp_path / "model", layers=1)
    first = families.fingerprint(folder)
    assert families.fingerprint(folder) == first
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert families.fingerprint(folder) != first


def test_state_is_whole(tmp_path):
    assert load_state(tmp_path) == (0, {})
    save_state(tmp_path, 3, {"x": torch.arange(4.0)})
    layer, tensors = load_state(tmp_path)
    assert layer == 3 and torch.equal(tensors["x"], torch.arange(4.0))
