"""The streamed backward pass against torch's autograd over the whole model, and stopped at every step of it."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from moepress.gradients import LOSS, layer_gradients
from moepress.models.families import FAMILIES
from moepress.models.streaming import ModelStream
from moepress.models.streams import mark
from zoo import ZOO, plain_deepseek, write_zoo_model

TOKENS = torch.randint(1, 250, (3, 20), generator=torch.Generator().manual_seed(1))


def by_autograd(model):
    """Gradient of the summed loss at each decoder layer's output."""
    outputs = []

    def watch(_, __, output):
        output.retain_grad()
        outputs.append(output)

    hooks = [layer.register_forward_hook(watch) for layer in model.model.layers]
    logits = model(input_ids=TOKENS, use_cache=False).logits[:, :-1].float()
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="sum")
    nll.backward()
    for hook in hooks:
        hook.remove()
    return nll.item(), [output.grad for output in outputs]


@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize("family", ZOO)
def test_against_autograd_on_the_whole_model(family, tmp_path):
    folder = write_zoo_model(tmp_path / "model", family)
    if family == "deepseek":
        model = plain_deepseek(folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    nll, expected = by_autograd(model)
    stream = ModelStream(folder)
    found = {index: g.clone() for index, g in layer_gradients(stream, TOKENS, tmp_path / "streams")}
    assert list(found) == list(range(2, min(stream.shape.moe_layers) - 1, -1)), "down to the first with experts"
    for index, g in found.items():
        assert torch.allclose(g, expected[index], rtol=2e-3, atol=2e-4 * expected[index].abs().max()), index
    assert sum(json.loads((tmp_path / "streams" / LOSS).read_text())) == pytest.approx(nll, rel=1e-4)


def test_stopped_at_every_layer_it_ends_with_the_same_bytes(tmp_path, monkeypatch):
    folder = write_zoo_model(tmp_path / "model", "qwen2_moe")
    whole = {index: g.clone() for index, g in layer_gradients(ModelStream(folder), TOKENS, tmp_path / "whole")}
    assert len(whole) == 3

    marked = []

    def stops_at_the_second(folder, layer):
        if len(marked) == 1:
            raise InterruptedError
        marked.append(layer)
        mark(folder, layer)

    monkeypatch.setattr("moepress.models.streams.mark", stops_at_the_second)
    found, starts = {}, 0
    while True:
        marked.clear()
        starts += 1
        try:
            for index, g in layer_gradients(ModelStream(folder), TOKENS, tmp_path / "stopped"):
                found[index] = g.clone()
            break
        except InterruptedError:
            continue
    assert starts == 5, "three layers forward, two backward: each start got one further"
    assert found.keys() == whole.keys() and all(torch.equal(found[i], whole[i]) for i in whole)
    names = {path.name for path in (tmp_path / "stopped").rglob("*.bin")}
    assert names == {"x-0.bin", "x-1.bin", "x-2.bin", "x-3.bin", "m.bin", "g-2.bin"}


def test_expert_weights_are_not_kept_for_the_backward(tmp_path):
    """What autograd saves of a layer is smaller than its experts."""
    folder = write_zoo_model(tmp_path / "model", "mixtral")
    stream, kept = ModelStream(folder), []
    with torch.no_grad():
        layer = stream.layer(0)
        x = stream.embed(TOKENS)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        stream.call(0, layer, x.requires_grad_())
    experts = layer.get_submodule(FAMILIES["mixtral"].experts)
    matrices = [matrix(e, torch.float32) for e in range(4) for matrix in (experts.gate_up_matrix, experts.down_matrix)]
    matrices += [matrix.T for matrix in matrices]
    assert kept and not any(t.shape == matrix.shape and torch.equal(t, matrix) for t in kept for matrix in matrices)
