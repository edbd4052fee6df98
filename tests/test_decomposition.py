"""A model made to select what another one selects: against the routing weights written out, over every family."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from tqdm import tqdm

from conftest import small_experiment
from moepress import artefacts, plan
from moepress.evaluation import perplexity as ppl
from moepress.evaluation.decomposition import Forced, forced, topk_overlap
from moepress.inference.checkpoint import load_model
from moepress.models.families import FAMILIES
from moepress.models.streaming import ModelStream
from moepress.pruning.policy import experts_of, routers_of
from moepress.studies import experiment
from zoo import write_zoo_model

BLOCKS = np.random.default_rng(0).integers(1, 250, (5, 16))


def measured(model):
    return ppl.measure(model, experts_of(model)[0].num_experts, BLOCKS, 2, None, tqdm(disable=True))


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request, tmp_path_factory):
    folder = write_zoo_model(tmp_path_factory.mktemp("zoo") / "model", request.param)
    return request.param, folder, load_model(folder)


def test_its_own_selections_change_nothing(family):
    _, _, model = family
    free = measured(model)
    with forced(model, free.selected_NSLK):
        assert np.array_equal(measured(model).nll_N, free.nll_N)
    assert np.array_equal(measured(model).nll_N, free.nll_N), "and nothing is left of it"


def test_forced_experts_get_the_weights_of_the_model(family):
    """Every layer selects experts drawn at random; their weights, from the router's logits, as each family defines them."""
    name, folder, model = family
    free, generator = measured(model), np.random.default_rng(1)
    E = experts_of(model)[0].num_experts
    K = free.selected_NSLK.shape[-1]
    drawn = generator.random((*free.selected_NSLK.shape[:-1], E)).argsort(-1)[..., :K]
    seen = []
    hooks = [
        router.register_forward_hook(lambda _, args, output: seen.append([part.float() for part in output]))
        for router in routers_of(model)
    ]
    with forced(model, drawn):
        other = measured(model)
    for hook in hooks:
        hook.remove()
    assert np.array_equal(other.selected_NSLK, drawn) and not np.allclose(other.nll_N, free.nll_N)
    if name != "phimoe":  # whose weights come of a softmax over the experts near the best
        stream = ModelStream(folder)
        config = model.config
        for logits, weights, index in seen:
            scores = stream.scores(logits).gather(1, index.long())
            renormalizes = name != "deepseek_v2" and getattr(config, "norm_topk_prob", True)
            expected = scores / scores.sum(1, keepdim=True) if renormalizes else scores
            scale = getattr(config, "routed_scaling_factor", getattr(config, "router_scaling_factor", 1.0)) or 1.0
            assert torch.allclose(weights, scale * expected, atol=1e-5)


def test_a_layer_at_a_time_gives_the_same(family, tmp_path):
    _, folder, model = family
    drawn = np.flip(measured(model).selected_NSLK, 0).copy()  # the selections of other text
    with forced(model, drawn):
        whole = measured(model)
    stream = ModelStream(folder)
    nll_N, _ = ppl.measure_streamed(stream, BLOCKS, None, tmp_path, tqdm(disable=True), Forced(drawn, stream.shape.num_experts))
    assert np.allclose(whole.nll_N, nll_N, atol=1e-4)


def test_overlap_against_sets():
    g = np.random.default_rng(0)
    a, b = (g.random((2, 5, 4, 7)).argsort(-1)[..., :3] for _ in range(2))
    overlap, same = topk_overlap(a, b)
    pairs = [[(set(a[n, s, layer]), set(b[n, s, layer])) for n in range(2) for s in range(5)] for layer in range(4)]
    assert overlap == pytest.approx([np.mean([len(p & q) / 3 for p, q in layer]) for layer in pairs])
    assert same == pytest.approx([np.mean([p == q for p, q in layer]) for layer in pairs])
    assert overlap == pytest.approx(1 - ppl.selection_shift(a, b).mean(0))


def test_the_stage(model_folder, text_folder, tmp_path, monkeypatch):
    """Beside an evaluation whose key it does not change; the same with a 16-bit model that does not fit in memory."""
    overrides = [*small_experiment(model_folder, text_folder), "device=cpu", "allocation=uniform", "allocation.bits=2"]
    overrides += [f"paths.results={tmp_path}", "evaluation.decomposition=true"]
    planned = plan.for_overrides(overrides)
    for folder in planned.artefacts:
        if not folder.startswith(("latency", "report")):
            artefacts.run_stage(artefacts.task_path(tmp_path, folder), tmp_path / folder)
    member = experiment(overrides)
    found = tmp_path / member.artefacts["decomposition"].folder
    domains = json.loads((found / "decomposition.json").read_text())["domains"]
    blocks = pd.read_parquet(found / "blocks.parquet")
    evaluated = pd.read_parquet(tmp_path / member.artefacts["evaluation"].folder / "blocks.parquet")
    assert np.allclose(blocks["both"], evaluated["nll"]) and set(domains) == set(evaluated["domain"])
    assert (blocks[["shift_only", "weights_only", "both"]].mean() != blocks["16bit"].mean()).all()
    metrics = json.loads((tmp_path / member.artefacts["evaluation"].folder / "metrics.json").read_text())
    for domain, one in domains.items():
        shift = metrics["domains"][domain]["selection_shift_by_layer"]
        assert one["topk_overlap"] == pytest.approx([1 - value for value in shift])
    plain = experiment([o for o in overrides if "decomposition" not in o])
    assert plain.artefacts["evaluation"] == member.artefacts["evaluation"] and "decomposition" not in plain.artefacts
    assert "decomposition" not in experiment([*overrides, "pruning=pesf"]).artefacts

    monkeypatch.setattr("moepress.stages.decomposition.fits", lambda *_: False)
    again = tmp_path / "decomposition" / "streamed"
    artefacts.run_stage(artefacts.task_path(tmp_path, member.artefacts["decomposition"].folder), again)
    streamed = pd.read_parquet(again / "blocks.parquet")
    assert np.allclose(streamed["shift_only"], blocks["shift_only"], atol=1e-4)
    assert not (again / "streams").exists()
