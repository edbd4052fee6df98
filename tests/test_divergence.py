"""How far predictions are from the 16-bit model's: against scipy, and the stage against two loaded models."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import rel_entr, softmax

from conftest import small_experiment
from moepress import artefacts, plan
from moepress.evaluation.divergence import divergence, same_choice
from moepress.inference.checkpoint import load_model
from moepress.pruning.policy import attach
from moepress.report import reading
from moepress.report.table import tabulate
from moepress.stages.evaluation import test_text as texts_of
from moepress.studies import experiment


def test_divergence_against_scipy():
    p, q = np.random.default_rng(0).normal(0, 3, (2, 4, 7, 30))
    found = divergence(*map(torch.from_numpy, (p, q)))
    assert np.allclose(found, rel_entr(softmax(p, -1), softmax(q, -1)).sum(-1), atol=1e-5) and found.shape == (4, 7)
    assert divergence(torch.from_numpy(p), torch.from_numpy(p + 5)).abs().max() < 1e-6, "the same predictions"
    assert np.array_equal(same_choice(*map(torch.from_numpy, (p, q))), p.argmax(-1) == q.argmax(-1))


@pytest.mark.parametrize("more", [["quantization=rtn", "evaluation.stride=5"], ["quantization=none", "pruning=ees"]])
def test_the_stage(model_folder, text_folder, tmp_path, more):
    """A row a block, of the tokens that perplexity is measured on, under the policy; other stages keep their keys."""
    given = [*small_experiment(model_folder, text_folder), "device=cpu", "allocation=uniform", "allocation.bits=2", *more]
    overrides = [*given, f"paths.results={tmp_path}", "evaluation.divergence=true", "latency.repeats=0"]
    member = experiment(overrides)
    for folder in plan.for_overrides(overrides).artefacts:
        artefacts.run_stage(artefacts.task_path(tmp_path, folder), tmp_path / folder)
    plain = experiment([o for o in overrides if "divergence" not in o])
    assert plain.artefacts == {stage: found for stage, found in member.artefacts.items() if stage != "divergence"}

    item = member.artefacts["divergence"]
    found = pd.read_parquet(tmp_path / item.folder / "blocks.parquet")
    config = member.config["evaluation"]
    texts = texts_of(tmp_path / item.inputs["corpus"].folder, model_folder, config)
    is_packed = "quantization" in member.artefacts
    original, other = (
        load_model(folder)
        for folder in (model_folder, tmp_path / member.artefacts["quantization"].folder if is_packed else model_folder)
    )
    if not is_packed:
        attach(other, json.loads((tmp_path / item.inputs["pruning"].folder / "policy.json").read_text()))
    scored = config["stride"] or config["seq_len"] - 1
    expected = []
    with torch.inference_mode():
        for domain, (blocks, _) in texts.items():
            for ids in torch.from_numpy(blocks):
                p, q = (model(ids[None]).logits[0, :-1].softmax(-1).numpy()[-scored:] for model in (original, other))
                expected.append((domain, rel_entr(p, q).sum(-1).mean(), (p.argmax(-1) == q.argmax(-1)).mean()))
    assert [*found["domain"]] == [domain for domain, *_ in expected] and (found["divergence"] > 1e-4).all()
    assert np.allclose(found[["divergence", "same_choice"]], [numbers for _, *numbers in expected], atol=1e-4)
    assert not (tmp_path / item.folder / "streams").exists()

    (report,) = tmp_path.glob("report/*/config.yaml")
    runs = reading.load(artefacts.read_config(report.parent)["runs"], tmp_path)
    table = tabulate(runs).set_index("run")
    assert np.isnan(table["divergence"].iloc[0]), "the 16-bit model itself"
    inside = found[found["domain"].isin(runs[1].domains[0])].groupby("domain")["divergence"]
    assert table["divergence"].iloc[1] == pytest.approx(inside.mean().mean())
    assert "divergence" in (report.parent / "summary.md").read_text()
