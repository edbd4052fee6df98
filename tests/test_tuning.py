"""Tuning against slow, obvious versions: one gradient by hand, one layer that can be repaired exactly, stop and resume."""

import math
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from conftest import small_experiment
from moepress import artefacts, dag, plan
from moepress.config import resolve
from moepress.data import sampling
from moepress.inference import saving
from moepress.inference.checkpoint import load, load_model
from moepress.inference.packed import PackedLinear, PackedMatrices
from moepress.models import limits, outline
from moepress.models.streaming import ModelStream
from moepress.models.streams import Streams
from moepress.quantization import distilling, grid, writer
from moepress.quantization.budget import Prediction, is_distilled
from moepress.quantization.experts import Recipe
from moepress.quantization.layers import STREAMS, LayerQuantizer, quantize_model
from moepress.quantization.tuning import Tuned, descend, token_weights, tune
from moepress.stages import quantization

COMMON = {"group_size": 32, "clip_min": 0.25, "clip_steps": 4, "fit_rounds": 1, "attention_bits": 4}
COMMON |= {"damping": 0.01, "block_size": 32, "router_ridge": 0.01}
TUNING = {"tune_steps": 6, "tune_tokens": 96, "tune_rate": 0.01}
TOKENS = torch.randint(1, 250, (6, 48), generator=torch.Generator().manual_seed(0))
BITS = [[2] * 4] * 2


def packed_linear(seed=0, bits=2):
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(32, 8, bias=False)
    linear.weight.data = torch.randn(8, 32, generator=generator)
    quantized = grid.rtn(linear.weight.data[None], [bits], 16, grid.Search(0.25, 4, 1))
    packed = PackedLinear(linear, bits, 16)
    for part, tensor in quantized.pack().items():
        packed.get_buffer(part).copy_(tensor)
    return packed, quantized, torch.randn(20, 32, generator=generator), linear.weight.data


def test_token_weights_hold_back_the_huge_ones():
    y = torch.ones(1, 5, 4)
    y[0, 4] *= 100
    assert torch.allclose(token_weights(y), torch.tensor([[1, 1, 1, 1, 1e-4]]))


def test_gradient_of_the_multipliers_by_hand():
    """d loss / d factor = sum over the group of dL/dW * W."""
    packed, quantized, x, w = packed_linear()
    tuned = Tuned(packed, {})
    tuned.groups(0.01)
    tuned.apply()
    ((packed(x) - x @ w.T) ** 2).sum().backward()
    q = quantized.dequantize()[0]
    by_hand = ((2 * (x @ (q - w).T).T @ x) * q).unflatten(1, (2, 16)).sum(-1)
    (factor,) = tuned.factors.values()
    assert torch.allclose(factor.grad[0], by_hand, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("rest", [False, True])
def test_tuning_lowers_each_layers_error(model_folder, rest):
    tuned = Recipe("gptq", **COMMON, **TUNING | {"tune_steps": 16}, tune_rest=rest)
    plain = list(quantize_model(ModelStream(model_folder), TOKENS, BITS, Recipe("gptq", **COMMON)))
    found = list(quantize_model(ModelStream(model_folder), TOKENS, BITS, tuned))
    for before, after in zip(plain, found, strict=True):
        assert after.diagnostics["output_error"] < before.diagnostics["output_error"]
        assert after.diagnostics["tuning_error"][1] < after.diagnostics["tuning_error"][0]
        assert before.tensors.keys() == after.tensors.keys()
        assert all(before.tensors[n].dtype == t.dtype and before.tensors[n].shape == t.shape for n, t in after.tensors.items())
        changed = {name for name in before.tensors if not torch.equal(before.tensors[name], after.tensors[name])}
        assert changed >= {name for name in before.tensors if name.endswith(".scales")}
        if after.index == 0:  # what enters the first layer is the same, and so is what tuning began with
            assert not any(name.endswith(".codes") for name in changed)
            assert any(name.endswith("norm.weight") for name in changed) == rest


def test_goes_on_from_any_layer_with_the_same_bytes(model_folder, tmp_path):
    recipe = Recipe("qesc", **COMMON, **TUNING, tune_rest=True, tune_asymmetry=0.5, refine_rounds=1)
    whole = list(quantize_model(ModelStream(model_folder), TOKENS, BITS, recipe))
    stopped = quantize_model(ModelStream(model_folder), TOKENS, BITS, recipe, tmp_path)
    next(stopped), next(stopped)
    stopped.close()
    (rest,) = quantize_model(ModelStream(model_folder), TOKENS, BITS, recipe, tmp_path)
    assert all(torch.equal(rest.tensors[name], tensor) for name, tensor in whole[1].tensors.items())
    assert rest.diagnostics == whole[1].diagnostics


def test_descent_is_torchs_adam_with_a_cosine():
    """Sequence by sequence: batches from one random order after the other, rates relative to what they move."""
    packed, quantized, x, w = packed_linear()
    steps, batch, rate, bias = 7, 3, 0.03, torch.linspace(-0.4, 0.5, 8)
    tuned = Tuned(packed, {"bias": nn.Parameter(bias.clone())})

    def loss_of(y_hat, chosen):
        return (y_hat - x[chosen] @ w.T).square().mean()

    found = descend(tuned, 20, batch, steps, rate, 5, lambda chosen: loss_of(packed(x[chosen]) + tuned.rest["bias"], chosen))

    q, generator = quantized.dequantize()[0].unflatten(1, (2, 16)), torch.Generator().manual_seed(5)
    factor, bias = torch.ones(8, 2, requires_grad=True), bias.requires_grad_()
    size = bias.detach().square().mean().sqrt().item()
    adam = torch.optim.Adam([{"params": [factor], "lr": rate}, {"params": [bias], "lr": rate * size}], betas=(0.9, 0.95))
    cosine = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    order = torch.cat([torch.randperm(20, generator=generator) for _ in range(2)])
    for step, loss in enumerate(found):
        chosen = order[step * batch : (step + 1) * batch]
        expected = loss_of(x[chosen] @ (q * factor[..., None]).flatten(1).T + bias, chosen)
        assert loss == pytest.approx(expected.item(), rel=1e-4)
        adam.zero_grad()
        expected.backward()
        adam.step()
        cosine.step()
    assert torch.allclose(tuned.rest["bias"], bias, atol=1e-5) and torch.allclose(tuned.factors[""][0], factor, atol=1e-5)
    assert (factor - 1).abs().max() > 0.05


def test_no_scale_ends_below_a_tenth_of_what_it_was():
    packed = packed_linear()[0]
    before, tuned = packed.scales.clone(), Tuned(packed, {})
    tuned.factors[""][0, 0], tuned.factors[""][0, 1] = -3.0, 0.5
    found = tuned.finish({})[".scales"]
    assert torch.equal(found[0, 0], (0.1 * before[0, 0].float()).half())
    assert torch.equal(found[0, 1], (0.5 * before[0, 1].float()).half()) and torch.equal(found[0, 2:], before[0, 2:])


def test_the_target_goes_from_the_quantized_streams_output_to_the_original_streams(model_folder, tmp_path):
    stream = ModelStream(model_folder)
    streams = Streams(tmp_path, STREAMS, (*TOKENS.shape, stream.shape.hidden_size))
    x_hat = streams["x_hat"].copy_(stream.embed(TOKENS) + 0.1)
    layer, x_next = stream.layer(0), torch.randn(x_hat.shape, generator=torch.Generator().manual_seed(1))
    found = {}
    for asymmetry in (0.0, 0.5, 1.0):
        recipe = Recipe("gptq", **COMMON, **TUNING, tune_asymmetry=asymmetry)
        target = LayerQuantizer(stream, layer, 0, recipe, streams, "routed").tuning_target
        with torch.no_grad():
            found[asymmetry] = target(x_hat, x_next, streams.scratch("m_hat")).clone()
            output = stream.call(0, layer, x_hat)
    assert torch.allclose(found[0.0], output, atol=1e-5) and torch.equal(found[1.0], x_next)
    assert torch.allclose(found[0.5], (output + x_next) / 2, atol=1e-5)


def test_the_first_error_is_the_weighted_formula(model_folder):
    """Before anything has moved, over all sequences in one step: token by token."""
    stream = ModelStream(model_folder)
    x_hat, layer = stream.embed(TOKENS), stream.layer(0)
    target = torch.randn(x_hat.shape, generator=torch.Generator().manual_seed(2)) * torch.logspace(-1, 1, 48)[:, None]
    with torch.no_grad():
        y_hat = stream.call(0, layer, x_hat)
    norms = {name: p for name, p in layer.named_parameters() if p.dim() == 1}
    first, _ = tune(stream, 0, layer, x_hat, target, Tuned(layer, norms), 2, TOKENS.numel(), 1e-3)
    sizes, above, below = target.norm(dim=-1), 0.0, 0.0
    for n, s in product(range(6), range(48)):
        weight = min(1.0, (sizes.median() / sizes[n, s]).item()) ** 2
        above += weight * (y_hat[n, s] - target[n, s]).square().sum().item()
        below += weight * target[n, s].square().sum().item()
    assert first == pytest.approx(above / below, rel=1e-4)


def test_only_scales_are_held_beside_the_packed_weights():
    """Codes stay packed: what Tuned adds is a scale and a factor for every group."""
    packed = packed_linear()[0]
    tuned = Tuned(packed, {})
    assert isinstance(packed, PackedMatrices) and packed.codes.dtype == torch.uint8
    assert sum(t.numel() for part in (tuned.scales, tuned.factors) for t in part.values()) == 2 * packed.scales.numel()


def written(stream, out):
    """The model packed by GPTQ in the folder `out`; what left the 16-bit model's last layer."""
    out.mkdir()
    recipe, modules = Recipe("gptq", **COMMON, distill_steps=12), {}
    for result in quantize_model(stream, TOKENS, BITS, recipe, out / "streams"):
        writer.write_shard(out, result.index, stream.shape.num_layers, result.tensors)
        modules |= result.modules
    writer.finish(out, stream, recipe.group_size, modules)
    return Streams(out / "streams", ("x",), (*TOKENS.shape, stream.shape.hidden_size))["x"]


def test_what_the_last_tuning_holds_is_foretold(model_folder, tmp_path):
    """All that a step leaves in memory for scales, norms and routers, tensor by tensor."""
    out = tmp_path / "packed"
    written(ModelStream(model_folder), out)
    prediction = Prediction(outline.read(model_folder, "model"), COMMON | {"shared_bits": None})
    model = load_model(out, "cpu").requires_grad_(False)
    rest = {name: p for name, p in model.model.named_parameters() if is_distilled(prediction.family, name)}
    tuned = Tuned(model, rest)
    adam = torch.optim.Adam(tuned.groups(0.01))
    tuned.apply()
    model(input_ids=TOKENS[:1]).logits.sum().backward()
    adam.step()
    moved = [*tuned.factors.values(), *rest.values()]
    moments = [adam.state[p][name] for p in moved for name in ("exp_avg", "exp_avg_sq")]
    held = [*tuned.scales.values(), *tuned.factors.values(), *tuned.before.values(), *(p.grad for p in moved), *moments]
    held += [module.scales for module in tuned.packed.values()]
    groups = sum(scales.numel() for scales in tuned.scales.values())
    head, expert, linears = model.lm_head.weight.numel(), 3 * 64 * 32, 2 * 64 * 64 + 2 * 64 * 32
    expected = sum(t.numel() * t.element_size() for t in held) - 2 * groups + 4 * (head + 3 * (expert + linears))
    assert prediction.tuning_bytes(0) == expected and len(rest) == 2 * 3 + 1
    assert prediction.tuning_bytes(96) - prediction.tuning_bytes(0) > 96 * 6 * 4 * model.config.vocab_size


def test_distilling_brings_the_packed_model_nearer_and_can_be_repeated(model_folder, tmp_path):
    """What is kept and put into the shards is what was tuned; codes stay; a second writing gives the same bytes."""
    stream, out = ModelStream(model_folder), tmp_path / "packed"
    x = written(stream, out)

    def divergence():
        with torch.inference_mode():
            log_p = load(model_folder, "cpu")[0](TOKENS).logits.log_softmax(-1)
            return (log_p.exp() * (log_p - load(out, "cpu")[0](TOKENS).logits.log_softmax(-1))).sum(-1).mean().item()

    before, codes = divergence(), load_file(out / "model-00001-of-00003.safetensors")
    found = distilling.distill(out, stream, x, TOKENS, 12, 96, 0.01)
    assert any(name.endswith("gate.weight") for name in found.tensors) and "model.norm.weight" in found.tensors
    assert abs(found.losses[0] / before - 1) < 0.5, "the streamed 16-bit model says what the loaded one says"
    distilling.keep(tmp_path / "tuned.safetensors", found)
    kept, losses, rate = distilling.kept(tmp_path / "tuned.safetensors")
    assert len(losses) == 12 and rate == pytest.approx(0.01)
    distilling.replace(out, kept)
    assert divergence() < 0.9 * before  # load checks every hash, too
    after = load_file(out / "model-00001-of-00003.safetensors")
    assert all(torch.equal(t, after[n]) for n, t in codes.items() if n.endswith((".codes", ".zeros")))
    assert {n: (t.dtype, t.shape) for n, t in codes.items()} == {n: (t.dtype, t.shape) for n, t in after.items()}
    distilling.replace(out, kept)
    assert all(torch.equal(t, after[n]) for n, t in load_file(out / "model-00001-of-00003.safetensors").items())


def test_a_rate_that_harms_is_quartered_and_nothing_is_left_of_it(model_folder, tmp_path, capsys):
    """From too high a rate the descent starts anew, to the bytes of one at the lower rate; where all harm, nothing is tuned."""
    out = tmp_path / "packed"
    x = written(ModelStream(model_folder), out)

    def distilled(steps, rate):
        return distilling.distill(out, ModelStream(model_folder), x, TOKENS, steps, 96, rate)

    lower, higher = distilled(10, 0.02), distilled(10, 0.32)
    assert (lower.rate, higher.rate) == (0.02, 0.02) and lower.losses == higher.losses
    assert all(torch.equal(tensor, higher.tensors[name]) for name, tensor in lower.tensors.items())
    assert capsys.readouterr().out.count("4 steps at") == 1 + 3, "a few steps tell"
    assert distilled(3, 48.0) == ({}, [], 0.0)
    assert "is left out" in capsys.readouterr().out


def test_a_rate_that_harms_at_first_only_is_kept(model_folder, tmp_path, capsys):
    """Adam's first steps may raise the divergence by more than half where all of them lower it; from twice on it is over."""
    out = tmp_path / "packed"
    x = written(ModelStream(model_folder), out)
    found = distilling.distill(out, ModelStream(model_folder), x, TOKENS, 40, 96, 0.1)
    trial, whole = (line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("tuning"))
    before, after_few, after_all = float(trial[8]), float(trial[10]), float(whole[10])
    assert 1.5 * before < after_few < 2 * before and after_all < before and found.rate == 0.1


def test_killed_while_the_shards_are_rewritten(tmp_path, model_folder, text_folder, monkeypatch):
    """The stage goes on from what was tuned and ends with the bytes of a run that nobody stopped."""
    overrides = [*small_experiment(model_folder, text_folder), "device=cpu", "quantization=best", "allocation=uniform"]
    overrides += ["allocation.bits=2", "quantization.tune_steps=2", "quantization.distill_steps=3"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for place in (whole, stopped):
        planned = plan.for_overrides([*overrides, f"paths.results={place}"])
        for folder in planned.artefacts:
            if folder.startswith(("corpus", "model", "calibration", "allocation")):
                artefacts.run_stage(artefacts.task_path(place, folder), place / folder)
    (folder,) = (folder for folder in planned.artefacts if folder.startswith("quantization"))
    artefacts.run_stage(artefacts.task_path(whole, folder), whole / folder)

    written = []

    def killed(out, name, tensors):
        if written:
            raise KeyboardInterrupt
        written.append(name)
        saving.write_shard(out, name, tensors)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(distilling, "write_shard", killed)
        artefacts.run_stage(artefacts.task_path(stopped, folder), stopped / folder)
    monkeypatch.setattr(distilling, "distill", None)  # it is not done again
    artefacts.run_stage(artefacts.task_path(stopped, folder), stopped / folder)
    names = [
        *(path.name for path in (whole / folder).glob("*.safetensors")),
        "diagnostics.json",
        "model.safetensors.index.json",
    ]
    assert len(names) == 5 and not (stopped / folder / "streams").exists()
    assert all((whole / folder / name).read_bytes() == (stopped / folder / name).read_bytes() for name in names)
    load(stopped / folder, "cpu")


def test_the_larger_sample_is_asked_for_where_it_is_used_and_changes_no_other_key(model_folder, text_folder):
    def inputs(*more):
        config = resolve([*small_experiment(model_folder, text_folder), "quantization=best", *more])
        return dag.artefact("quantization", config).inputs

    of_gptq = inputs("quantization=gptq")
    for found, wanted in (
        (inputs("quantization.distill_sequences=16"), 16),
        (inputs("quantization.distill_steps=2", "quantization.tune_tokens=192"), 2 * 192 // 64),  # no more than is read
        (inputs("quantization.distill_sequences=null"), None),
        (inputs("quantization.distill_steps=0"), None),
        (of_gptq, None),
    ):
        assert found["calibration"].key == of_gptq["calibration"].key
        assert ("distillation" in found) == (wanted is not None)
        if wanted is not None:
            config, own = found["distillation"].config["calibration"], found["calibration"].config["calibration"]
            assert config == own | {"at_most": wanted}


def test_available_against_counting_down():
    for counts in product(range(4), repeat=3):
        blocks = {str(i): np.zeros((count, 2)) for i, count in enumerate(counts)}
        for wanted in range(1, 12):
            can = [n for n in range(wanted + 1) if np.all(np.array(sampling.even_shares(n, 3)) <= counts)]
            found = sampling.available(blocks, wanted)
            assert found == max(can)
            assert len(sampling.sample_calibration(blocks, found, 0)[0]) == found


def test_a_model_that_does_not_fit_is_refused_before_any_work(model_folder, monkeypatch):
    config = resolve(["model=local", f"model.path={model_folder}", "quantization.group_size=32"])
    task = SimpleNamespace(config={"quantization": config["quantization"]})
    stream = ModelStream(model_folder)
    prediction = Prediction(outline.read(model_folder, "model"), config["quantization"])
    packed, tuning = prediction.loaded_bytes(BITS, "cpu"), prediction.tuning_bytes(1024)
    monkeypatch.setattr(limits, "free_memory", lambda: packed + tuning)
    quantization.check_memory(task, stream, BITS, 64)
    monkeypatch.setattr(limits, "free_memory", lambda: packed + tuning - 1)
    with pytest.raises(ValueError, match=r"distill_steps=500: .* and its tuning .*experiment=fast"):
        quantization.check_memory(task, stream, BITS, 64)
    monkeypatch.setattr(limits, "free_memory", lambda: packed + tuning)
    with pytest.raises(ValueError, match="its tuning"):
        quantization.check_memory(task, stream, BITS, 2048)  # a step is a sequence at least
    task.config["quantization"]["distill_steps"] = 0
    quantization.check_memory(task, stream, BITS, 2048)
