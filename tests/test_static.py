"""Static expert removal against a model without the removed router rows, in every family; its scores against loops."""

import pytest
import torch

from conftest import small_experiment
from moepress import artefacts, config, dag, plan, studies
from moepress.artefacts import read_json
from moepress.evaluation.usage import watched
from moepress.inference.checkpoint import load, load_model
from moepress.models.families import FAMILIES
from moepress.pruning import label
from moepress.pruning.fitting import fit
from moepress.pruning.policy import NEEDED, attach, experts_of, moe_layers
from moepress.pruning.static import Scores, lowest
from moepress.schema import SCHEMA
from moepress.schema.pruning import is_fitted
from zoo import ZOO, write_zoo_model

TOKENS = torch.randint(1, 250, (3, 20), generator=torch.Generator().manual_seed(0))


class Progress:
    def update(self, _):
        pass


@pytest.mark.parametrize("family", ZOO)
@torch.inference_mode()
def test_a_removed_expert_is_never_used_and_tokens_choose_among_the_rest(family, tmp_path):
    model = load_model(write_zoo_model(tmp_path / family, family))
    names = FAMILIES[model.config.model_type]
    for layer in moe_layers(model):  # a correction so strong that it would choose the removed ones with a score of 0
        if names.correction:
            names.correction_of(layer).view(-1)[[0, 3]] = 5.0
    plain = model(input_ids=TOKENS).logits
    E, num_layers = experts_of(model)[0].num_experts, len(experts_of(model))
    logits = []
    router = moe_layers(model)[0].get_submodule(names.router_path)
    hook = router.register_forward_hook(lambda _, __, output: logits.append(output[0].float()))
    policy = attach(model, {"method": "static", "removed": [[0, 3]] * num_layers})
    with watched(model) as (chosen, kept):
        pruned = model(input_ids=TOKENS).logits
    policy.remove()
    hook.remove()
    again = model(input_ids=TOKENS).logits
    assert pruned.isfinite().all() and torch.allclose(again, plain, atol=1e-5)
    assert not torch.allclose(pruned, plain, atol=1e-3)
    for slots_TK in kept:
        assert not torch.isin(slots_TK, torch.tensor([0, 3])).any()
        if names.scores == "softmax" and not names.correction and family != "deepseek_v2":
            assert (slots_TK < E).all(), "as many experts for each token as before"
    if names.scores == "softmax" and not names.correction and family not in ("deepseek_v2", "phimoe"):
        rest = logits[0].masked_fill(torch.isin(torch.arange(E), torch.tensor([0, 3])), -torch.inf)
        expected = rest.topk(kept[0].shape[1]).indices.sort(-1).values
        assert torch.equal(chosen[0].sort(-1).values, expected), "the best of the rest"


@torch.inference_mode()
def test_against_a_model_that_never_had_the_removed_experts(model_folder):
    """Layer by layer: the block of the pruned model is the block of one whose router and experts are the rest's."""
    model, _ = load(model_folder, "cpu")
    smaller, _ = load(model_folder, "cpu")
    rest = [0, 2, 3]
    for layer in smaller.model.layers:
        layer.mlp.gate.weight.data = layer.mlp.gate.weight[rest].clone()
        for name in ("gate_up_proj", "down_proj"):
            getattr(layer.mlp.experts, name).data = getattr(layer.mlp.experts, name)[rest].clone()
        layer.mlp.experts.num_experts = 3
    policy = attach(model, {"method": "static", "removed": [[1], [1]]})
    assert torch.allclose(model(input_ids=TOKENS).logits, smaller(input_ids=TOKENS).logits, atol=1e-4)
    policy.remove()


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
@torch.inference_mode()
def test_scores_against_loops(model_folder, experts):
    model, _ = load(model_folder, "cpu")
    model.set_experts_implementation(experts)
    seen = []
    hook = experts_of(model)[1].register_forward_pre_hook(lambda _, args: seen.append(args))
    model(input_ids=TOKENS)
    hook.remove()
    (hidden, index, weights), module = seen[0], experts_of(model)[1]
    norms, counts = [0.0] * 4, [0] * 4
    for t in range(len(hidden)):
        for k in range(2):
            e = int(index[t, k])
            gate, up = (module.gate_up_proj[e] @ hidden[t]).chunk(2)
            out = module.down_proj[e] @ (torch.nn.functional.silu(gate) * up)
            norms[e] += float(weights[t, k] * out.norm())
            counts[e] += 1
    reap = fit(model, TOKENS, {"method": "static", "criterion": "reap", "ratio": 0.5}, Progress())
    assert reap["scores"][1] == pytest.approx([n / max(c, 1) for n, c in zip(norms, counts, strict=True)], rel=1e-4)
    assert reap["removed"][1] == sorted(sorted(range(4), key=lambda e: reap["scores"][1][e])[:2])
    assert reap["calibration"]["active_slots"] == 1 and reap["calibration"]["remaining_experts"] == 0.5
    frequency = fit(model, TOKENS, {"method": "static", "criterion": "frequency", "ratio": 0.25}, Progress())
    assert frequency["scores"][1] == pytest.approx([c / sum(counts) for c in counts])
    assert [len(layer) for layer in frequency["removed"]] == [1, 1]
    assert not any(e._forward_pre_hooks for e in experts_of(model)), "nothing stays behind"


def test_an_expert_that_no_token_selects_has_no_score():
    scores = Scores(3)
    scores.tokens_E += torch.tensor([2.0, 0.0, 4.0])
    scores.norms_E += torch.tensor([3.0, 0.0, 2.0])
    assert scores.of("reap").tolist() == [1.5, 0.0, 0.5]
    assert scores.of("frequency").tolist() == pytest.approx([1 / 3, 0.0, 2 / 3])


def test_the_lowest_go_and_enough_remain():
    scores = torch.tensor([3.0, 1.0, 2.0, 1.0, 9.0, 8.0])
    assert lowest(scores, 0.5, 2) == [1, 2, 3] and lowest(scores, 0.1, 2) == [] and lowest(scores, 1 / 3, 2) == [1, 3]
    with pytest.raises(ValueError, match=r"pruning\.ratio=0\.9: of 6 experts 2 must remain; at most 0\.66"):
        lowest(scores, 0.9, 2)


def test_labels_tell_every_value():
    odp = {"method": "odp", "quantile": 0.5, "threshold": None, "protect": 0.02, "renormalize": True}
    assert label({"method": "none"}) == ""
    assert label({"method": "pesf", "alpha": 0.3, "renormalize": True}) == "PESF 0.3"
    assert label(odp) == "ODP median 2%" and label(odp | {"threshold": 0.4, "protect": 0}) == "ODP 0.4 0%"
    assert label(odp | {"method": "ees", "quantile": 0.3, "renormalize": False}) == "EES q0.3 raw"
    assert label({"method": "static", "criterion": "reap", "ratio": 0.25}) == "static REAP 0.25"
    assert label({"method": "drop", "ratio": 0.25, "renormalize": False}) == "drop 0.25 raw", "one without words of its own"


def test_every_policy_of_the_schema_can_be_attached():
    assert set(NEEDED) == set(SCHEMA["pruning"]), "pruning/policy.py says what each needs"


@pytest.mark.parametrize("pruning", [["pruning=odp", "pruning.protect=0.1"], ["pruning=static"]])
def test_the_stages(tmp_path, model_folder, text_folder, pruning):
    """Fitted on the quantized checkpoint, evaluated with it; the shares that it saves stand in policy.json and metrics.json."""
    overrides = [*small_experiment(model_folder, text_folder), "device=cpu", "quantization=rtn", "allocation=uniform"]
    overrides += ["allocation.bits=3", *pruning, f"paths.results={tmp_path}"]
    planned = plan.for_overrides(overrides)
    for folder in planned.artefacts:
        artefacts.run_stage(artefacts.task_path(tmp_path, folder), tmp_path / folder)
    member = studies.experiment(overrides)
    evaluation = member.artefacts["evaluation"]
    policy = read_json(tmp_path / evaluation.inputs["pruning"].folder / "policy.json")
    metrics = read_json(tmp_path / evaluation.folder / "metrics.json")
    assert evaluation.inputs["pruning"].inputs.keys() == {"checkpoint", "calibration"}
    assert evaluation.inputs["pruning"].inputs["checkpoint"] == member.artefacts["quantization"]
    if pruning[0] == "pruning=odp":
        assert 0.7 < policy["calibration"]["active_slots"] < 0.85 and 0.6 < metrics["active_slots"] < 0.9
        assert metrics["protected_tokens"] == pytest.approx(6 / 64)
    else:
        assert [len(layer) for layer in policy["removed"]] == [1, 1] and metrics["active_slots"] == 1
    model, _ = load(
        tmp_path / member.artefacts["quantization"].folder, "cpu", pruning=tmp_path / evaluation.inputs["pruning"].folder
    )
    assert model(input_ids=TOKENS).logits.isfinite().all()


def test_only_what_is_fitted_depends_on_the_checkpoint():
    keys = {}
    for method in ("pesf", "odp"):
        for quantization in ("gptq", "qesc"):
            found = dag.artefact("pruning", config.resolve([f"pruning={method}", f"quantization={quantization}"]))
            keys[method, quantization] = found.key
    assert keys["pesf", "gptq"] == keys["pesf", "qesc"] and keys["odp", "gptq"] != keys["odp", "qesc"]
    assert not is_fitted("drop"), "nor is any that is not said to be"
