"""device=cuda without a GPU: on a pretend one every stage runs, and gives the numbers of the CPU. See pretend_gpu.py."""

import copy
import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM

from conftest import small_experiment, write_model
from moepress import artefacts, plan
from moepress.inference.checkpoint import load_model
from moepress.latency.graphs import StaticDecoding
from moepress.models import carved
from moepress.models.streaming import ModelStream
from moepress.pruning.policy import attach
from moepress.quantization import grid, writer
from moepress.quantization.experts import Recipe
from moepress.quantization.layers import quantize_model
from pretend_gpu import pretend_gpu
from test_carving import recipe, source, text

__all__ = ["source", "text"]  # fixtures
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU")
DEVICES = ("cpu", "cuda")
TOKENS = torch.randint(1, 250, (4, 32), generator=torch.Generator().manual_seed(0))
BITS = [[1, 2, 3, 4], [8, 3, 3, 2]]


def on(device: str):
    return pretend_gpu() if device == "cuda" else nullcontext()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A float32 model, as a GPU takes it in the checkpoint's own dtype."""
    return write_model(tmp_path_factory.mktemp("float32"), dtype="float32")


@pytest.fixture
def same_search(monkeypatch):
    """The CPU's search is torch's, too: of two grids that are equally good the compiled one may take the other."""
    monkeypatch.setattr("moepress.quantization.grid_cpu.search", grid.search_by_torch)


# --- the pretend GPU -------------------------------------------------------------------------------------------------


MIXES = {
    "sum": lambda x, y: x + y,
    "in place": lambda x, y: y.add_(x),
    "into a CPU scalar": lambda x, y: torch.tensor(0.0).add_(x.sum()),
    "matrix": lambda x, y: torch.nn.functional.linear(x, y[None]),
    "where": lambda x, y: torch.where(x > 0, x, y),
    "cat": lambda x, y: torch.cat([x, y]),
    "mask": lambda x, y: x.masked_fill(y > 0, 0),
    "rows": lambda x, y: x.index_select(0, torch.tensor([0])),
    "index of the GPU": lambda x, y: y[torch.tensor([0, 1], device="cuda")],
    "values by index": lambda x, y: x.__setitem__(torch.tensor([0, 1]), y[:2]),
    "generator": lambda x, y: torch.multinomial(x, 1, generator=torch.Generator()),
    "the GPU's generator": lambda x, y: torch.randn(3, generator=torch.Generator("cuda")),
}
ALLOWED = {
    "scalar": lambda x, y: x + torch.tensor(1.0),
    "index": lambda x, y: x[torch.tensor([0, 1])],
    "mask": lambda x, y: x[y > 0],
    "copy": lambda x, y: y.copy_(x),
    "slice": lambda x, y: y.__setitem__(slice(2), x[:2]),
    "one value": lambda x, y: y.__setitem__(0, x[0]),
    "like": lambda x, y: torch.zeros_like(x) + x.new_ones(3) + torch.nn.functional.one_hot(x.long() - 1, 3)[0],
    "generator": lambda x, y: torch.rand(3, generator=torch.Generator("cuda"), device="cuda") + x,
    "to and fro": lambda x, y: x.cpu() + y + x.to("cpu", torch.float64) + x.tolist()[0] + x.sum().item(),
    "views": lambda x, y: x[1:].add_(1) + x.view(3, 1)[1:, 0] + torch.tensor([1, 2], device="cuda"),
}


@pytest.mark.parametrize("how", MIXES)
def test_tensors_of_two_devices_do_not_meet(how):
    with pretend_gpu(), pytest.raises(RuntimeError, match=r"at least two devices|device type for generator"):
        MIXES[how](torch.ones(3, device="cuda"), torch.ones(3))


def test_what_cuda_allows_is_allowed():
    for how in ALLOWED.values():
        with pretend_gpu():
            how(torch.ones(3).cuda(), torch.ones(3))


def test_no_array_of_a_gpus_tensor():
    with pretend_gpu():
        for make in (torch.Tensor.numpy, np.asarray):
            with pytest.raises(TypeError, match="can't convert cuda"):
                make(torch.ones(3, device="cuda"))
        x = torch.ones(2, 3, device="cuda").T.detach()
        assert x.is_cuda and not x.is_cpu and x.device == torch.device("cuda:0") and not x.cpu().is_cuda
    assert not torch.cuda.is_available() and torch.ones(3).device.type == "cpu"


def test_a_model_is_trained_and_generates_as_on_the_cpu():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    start = MixtralForCausalLM(MixtralConfig(vocab_size=60, num_local_experts=4, num_key_value_heads=1, **sizes))
    found = {}
    for device in DEVICES:
        with on(device):
            model, ids = copy.deepcopy(start).to(device), (TOKENS % 60).to(device)
            model.set_experts_implementation("eager")
            optimizer = torch.optim.Adam(model.parameters(), 1e-2)
            for _ in range(2):
                loss = model(ids, labels=ids).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            assert loss.device.type == model.lm_head.weight.device.type == device
            found[device] = (loss.item(), model.generate(ids[:1], max_new_tokens=4, do_sample=False).tolist())
    assert found["cuda"] == found["cpu"]


# --- quantization ----------------------------------------------------------------------------------------------------

COMMON = {"group_size": 32, "clip_min": 0.5, "clip_steps": 2, "fit_rounds": 1, "attention_bits": 4}
GPTQ = COMMON | {"method": "gptq", "damping": 0.01, "block_size": 16}
QESC = GPTQ | {"method": "qesc", "router_ridge": 0.01, "router_learning_rate": 0.01, "router_steps": 3, "router_batch": 64}
TUNED = {"tune_steps": 2, "tune_tokens": 64, "tune_rate": 1e-3, "tune_rest": True, "tune_asymmetry": 0.5, "refine_rounds": 1}
RECIPES = {
    "rtn": COMMON | {"method": "rtn"},
    "gptq": GPTQ | {"act_order": True, "clip_norm": 2.4},
    "gptq_mc": GPTQ | {"clip_ends": "together", "one_bit": "sign", "deferred_bits": 2},
    "mse": QESC | {"router_loss": "mse", "router_when": "after"},
    "topk_mse_gd": QESC | {"router_loss": "topk_mse_gd", "router_candidates": 3},
    "kl": QESC | {"router_loss": "kl"},
    "fast": QESC | {"asymmetry": 0.5, "refine_rounds": 1},
    "tuned": QESC | TUNED | {"router_when": "both", "router_candidates": 3},
}


def compress(folder, out, settings, device, coverage="routed", layers=2) -> list[dict]:
    """Quantize the first layers, or the rest of them where there are some; returns their diagnostics."""
    stream, modules, told = ModelStream(folder, device), {}, []
    tokens = None if settings["method"] == "rtn" else TOKENS
    for result in quantize_model(stream, tokens, BITS, Recipe(**settings), out.with_name(f"{out.name}-streams"), coverage):
        writer.write_shard(out, result.index, 2, result.tensors)
        modules |= result.modules
        told.append(result.diagnostics)
        if result.index + 1 == layers:
            break
    writer.finish(out, stream, settings["group_size"], modules)
    return told


def tensors(folder) -> dict:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def close(found: dict, expected: dict) -> None:
    """As many codes and scales as one rounding moves may differ."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] != tensor).float().mean() < 0.02, name


@pytest.mark.usefixtures("same_search")
@pytest.mark.parametrize("name, coverage", [*((name, "routed") for name in RECIPES), ("gptq", "weighted"), ("fast", "all")])
def test_a_gpu_quantizes_as_the_cpu(folder, tmp_path, name, coverage):
    for device in DEVICES:
        (tmp_path / device).mkdir()
        with on(device):
            told = compress(folder, tmp_path / device, RECIPES[name], device, coverage)
        json.dumps(told)  # numbers of Python
    close(tensors(tmp_path / "cuda"), tensors(tmp_path / "cpu"))


def test_a_run_that_was_killed_goes_on_on_a_gpu(folder, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    with pretend_gpu():
        for out, layers in ((whole, (2,)), (stopped, (1, 2))):
            out.mkdir()
            for last in layers:
                compress(folder, out, RECIPES["kl"], "cuda", layers=last)
    found, expected = tensors(stopped), tensors(whole)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


# --- inference -------------------------------------------------------------------------------------------------------

POLICIES = {
    "none": {"method": "none"},
    "pesf": {"method": "pesf", "alpha": 0.9, "renormalize": True},
    "odp": {"method": "odp", "threshold": 0.5, "protect": 0.1, "renormalize": True},
    "ees": {"method": "ees", "threshold": 0.5, "renormalize": True},
    "static": {"method": "static", "removed": [[0], [1]]},
}


@pytest.fixture(scope="module")
def packed(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed")
    compress(folder, out, RECIPES["rtn"], "cpu")
    return out


@torch.inference_mode()
def test_a_packed_model_answers_as_on_the_cpu(packed, monkeypatch):
    found = {}
    for device in DEVICES:
        with on(device):
            model, ids = load_model(packed, device, torch.float32), TOKENS[:2].to(device)
            for name, policy in POLICIES.items():
                attached = attach(model, policy)
                found[device, name] = model(ids).logits.cpu(), model.generate(ids, max_new_tokens=3, do_sample=False).tolist()
                attached.remove()
        monkeypatch.setattr("moepress.inference.packed._cpu", lambda: pytest.fail("compiled for a CPU"))
    for name in POLICIES:
        (cpu, written), (gpu, again) = found["cpu", name], found["cuda", name]
        torch.testing.assert_close(gpu, cpu, atol=1e-4, rtol=1e-4)
        assert again == written


class Watched:
    """A kernel whose tensors must all be on the GPU."""

    def __init__(self, kernel):
        self.kernel, self.calls = kernel, 0

    def __getitem__(self, grid):
        def run(*args, **constants):
            assert all(each.is_cuda for each in args if isinstance(each, torch.Tensor))
            self.calls += 1
            return self.kernel[grid](*args, **constants)

        return run


def test_the_kernels_are_given_what_is_on_the_gpu(packed, monkeypatch):
    """A capability that they are for: the interpreter runs them. Nothing waits at a single token, so a graph can hold it."""
    pytest.importorskip("triton", reason="triton is for Linux")
    from moepress.inference.kernels import device

    for name in ("multiply", "combine"):
        monkeypatch.setattr(device, name, Watched(getattr(device, name)))
    ids = TOKENS[:1, :20]
    with torch.inference_mode():
        expected = load_model(packed)(ids).logits
        with pretend_gpu(capability=(8, 0)):
            model = load_model(packed, "cuda", torch.float32)
            torch.testing.assert_close(model(ids.cuda()).logits.cpu(), expected, atol=1e-4, rtol=1e-4)
            layer, x = model.model.layers[0], torch.ones(1, 1, 64, device="cuda")
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                layer.mlp(x), layer.self_attn.q_proj(x)
    assert device.multiply.calls and device.combine.calls


@pytest.mark.parametrize("policy", POLICIES)
def test_decoding_waits_for_nothing_so_that_a_graph_can_hold_it(folder, policy):
    with pretend_gpu():
        model = load_model(folder, "cuda")
        attached = attach(model, POLICIES[policy])
        decoding = StaticDecoding(model, TOKENS[:1, :12].cuda(), 8)
        decoding.capture()
        attached.remove()
        model.set_experts_implementation("eager")
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            decoding.capture()


# --- the stages ------------------------------------------------------------------------------------------------------

STAGES = {
    "of all statistics, removed, with tasks": [
        *("allocation=global", "quantization=qesc", "pruning=static", "evaluation.tasks=quick", "evaluation.limit=2"),
    ],
    "by hessians, ODP": ["allocation=hessian", "quantization=gptq", "pruning=odp"],
    "tuned, decomposed": [
        *("allocation=uniform", "allocation.bits=2", "quantization=best", "quantization.group_size=32"),
        *("quantization.tune_steps=1", "quantization.distill_steps=2", "quantization.distill_sequences=null"),
        *("evaluation.decomposition=true", "evaluation.divergence=true"),
    ],
}
TOLD = ("statistics", "allocation", "gradients", "policy", "metrics", "decomposition", "divergence")


def run_stages(folder, text_folder, settings, place, device) -> dict:
    """All of an experiment's but the report; returns by file the numbers that they leave."""
    quick = ["latency.repeats=0", "quantization.clip_steps=2", "calibration.num_sequences=4", "evaluation.num_blocks=2"]
    overrides = [*small_experiment(folder, text_folder), *quick, *settings, f"device={device}", f"paths.results={place}"]
    planned = plan.for_overrides(overrides)
    for name in planned.artefacts:
        if not name.startswith("report"):
            artefacts.run_stage(artefacts.task_path(place, name), place / name)
    return {
        path.relative_to(place): numbers(json.loads(path.read_text())) for name in TOLD for path in place.rglob(f"{name}.json")
    }


def numbers(value) -> list[float]:
    if isinstance(value, dict | list):
        return [number for part in (value.values() if isinstance(value, dict) else value) for number in numbers(part)]
    return [value] if isinstance(value, int | float) else []


@pytest.mark.usefixtures("same_search")
@pytest.mark.parametrize("name", STAGES)
def test_the_stages_say_what_they_say_on_the_cpu(folder, text_folder, tmp_path, name):
    found = {}
    for device in DEVICES:
        with on(device):
            found[device] = run_stages(folder, text_folder, STAGES[name], tmp_path / device, device)
    assert found["cuda"].keys() == found["cpu"].keys()
    for path, expected in found["cpu"].items():
        assert found["cuda"][path] == pytest.approx(expected, rel=1e-3, abs=1e-6), path


def test_what_fits_is_timed_and_what_does_not_is_evaluated_layer_by_layer(folder, text_folder, tmp_path, monkeypatch):
    for stage in ("evaluation", "decomposition"):
        monkeypatch.setattr(f"moepress.stages.{stage}.fits", lambda *_: False)
    settings = ["allocation=uniform", "allocation.bits=2", "quantization=rtn", "evaluation.decomposition=true"]
    settings += ["evaluation.tasks=quick", "evaluation.limit=2", "latency.repeats=1"]
    with pretend_gpu():
        found = run_stages(folder, text_folder, settings, tmp_path, "cuda")
    assert any(path.name == "decomposition.json" for path in found)
    (path,) = tmp_path.glob("latency/rtn*/latency.json")
    rows = json.loads(path.read_text())["rows"]
    assert {row["memory_is"] for row in rows} == {"peak"} and any(row.get("graph_ms") for row in rows)


def test_a_dense_model_is_carved_and_recovered(source, text, tmp_path):
    """With the CPU's cuts; the distillation is in bfloat16 on a GPU."""
    for device in DEVICES:
        (tmp_path / device).mkdir()
        settings = recipe()
        settings["recover"]["steps"] = 2
        with on(device):
            carved.carve(settings, text, source, tmp_path / device, device)
    cpu, gpu = (json.loads((tmp_path / device / "carving.json").read_text()) for device in DEVICES)
    assert numbers(gpu["layers"]) == pytest.approx(numbers(cpu["layers"]), rel=1e-4)
    assert numbers(gpu["held_out"]) == pytest.approx(numbers(cpu["held_out"]), rel=0.05, abs=0.01)
