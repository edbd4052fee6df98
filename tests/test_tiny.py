"""The small default model: its parts against plain references, and a very small training end to end."""

import copy
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moepress.models import muon, tiny
from moepress.stages import model as model_stage

CONFIG = yaml.safe_load((Path(__file__).parents[1] / "conf" / "model" / "tiny.yaml").read_text())


def small(**training) -> dict:
    config = copy.deepcopy(CONFIG)
    config["architecture"] |= {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 16}
    config["architecture"] |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
    config["tokenizer"] |= {"vocab_size": 320, "characters": 5000}
    config["training"] |= {"steps": 30, "batch_size": 4, "seq_len": 32, "warmup": 5} | training
    config["held_out"] |= {"seq_len": 32, "num_sequences": 8}
    return config


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """Two domains that share no word, and one that is only tested."""
    folder, random = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    rows = []
    for domain, alphabet in (("left", "abcdefgh"), ("right", "stuvwxyz"), ("far", "123456é€")):
        words = ["".join(random.choice(list(alphabet), 4)) for _ in range(30)]
        for number in range(60):
            split = "test" if domain == "far" or number % 4 == 0 else "train"
            rows.append((domain, split, str(number), " ".join(random.choice(words, 60))))
    path = folder / "documents.parquet"
    pd.DataFrame(rows, columns=["domain", "split", "document", "text"]).to_parquet(path, index=False)
    return path


def train(config, documents, out):
    out.mkdir(exist_ok=True)
    return tiny.train(config, documents, out)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def trained(documents, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return folder, train(small(), documents, folder)


def test_it_is_an_ordinary_model_folder(trained):
    folder, _ = trained
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16 and model.config.sliding_window is None
    assert tokenizer.is_fast and len(tokenizer) == model.config.vocab_size == 320
    assert model.config.eos_token_id == tokenizer.eos_token_id == tokenizer.bos_token_id == tokenizer.pad_token_id
    for text in ("Ein Wort,  two\n\twords\n", "naïve é 漢字 \u0000 🙂"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    experts = [tensor for name, tensor in load_file(folder / "model.safetensors").items() if ".experts." in name]
    assert len(experts) == 2 * 4 * 3 and all(tensor.ndim == 2 for tensor in experts)
    assert {path.name for path in folder.iterdir()} >= {"training.csv", "specialisation.json"}
    assert tiny.STATE in model_stage.WORK, "what is only there to go on from is the stage's to remove"


def test_it_learns(trained):
    folder, result = trained
    losses = pd.read_csv(folder / "training.csv")["loss"]
    assert len(losses) == 30 and losses.iloc[0] == pytest.approx(np.log(320), abs=0.3)
    assert losses.iloc[-3:].mean() < losses.iloc[0] - 1.5
    held_out = result["held_out"]
    assert held_out["left"]["loss"] < losses.iloc[0] - 1.5 < held_out["far"]["loss"]


def test_report_is_of_the_saved_model(trained, documents):
    """Loss and selections by domain, computed again by the model as others load it."""
    folder, result = trained
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    test = pd.read_parquet(documents)
    text = test["text"][(test["domain"] == "left") & (test["split"] == "test")]
    sequences = tiny.tokenize(tokenizer, text, 32)[:8]
    with torch.no_grad():
        output = model(sequences[:, :-1], output_router_logits=True)
    loss = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), sequences[:, 1:].flatten())
    assert result["held_out"]["left"]["loss"] == pytest.approx(loss.item(), abs=0.02)
    for layer, logits in zip(result["layers"], output.router_logits, strict=True):
        counts = logits.topk(2).indices.flatten().bincount(minlength=4)
        assert sum(layer["counts"]["left"]) == counts.sum()
        assert np.abs(np.array(layer["counts"]["left"]) - counts.numpy()).sum() < 0.05 * counts.sum()
        assert sum(layer["share"]) == pytest.approx(1) and min(layer["share"]) == layer["min_share"]
        assert 0 <= layer["mutual_information_bits"] <= 1  # two domains were trained on
    assert result["layers"] == json.loads((folder / "specialisation.json").read_text())["layers"]


def test_same_seed_same_bytes(trained, documents, tmp_path):
    train(small(), documents, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(trained[0])
    train(small() | {"seed": 1}, documents, tmp_path / "other")
    assert contents(tmp_path / "other")["model.safetensors"] != contents(trained[0])["model.safetensors"]


def test_killed_and_started_again(trained, documents, tmp_path, monkeypatch):
    backward, calls = tiny.backward, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 14:
            raise KeyboardInterrupt
        return backward(*args)

    config, out = small(save_seconds=0), tmp_path / "model"
    monkeypatch.setattr(tiny, "backward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config, documents, out)
    assert not (out / "config.json").exists()
    train(config, documents, out)
    assert len(calls) == 14 + 30 - 13  # 13 steps were not done again
    assert {name: data for name, data in contents(out).items() if name != tiny.STATE} == contents(trained[0])


def test_state_of_another_config_is_not_taken_up(trained, documents, tmp_path):
    config = small(save_seconds=0)
    tokenizer = AutoTokenizer.from_pretrained(trained[0])
    model = tiny.build(config["architecture"], tokenizer)
    optimizer = muon.Optimizer(model, config["training"])
    tiny.save_state(tmp_path, config, model, optimizer, [{"step": 0}])
    assert tiny.resume(tmp_path, config, model, optimizer) == [{"step": 0}]
    assert tiny.resume(tmp_path, config | {"seed": 5}, model, optimizer) == []


def test_a_domain_with_less_test_text_than_a_sequence_is_left_out(trained, documents, tmp_path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(trained[0]), AutoTokenizer.from_pretrained(trained[0])
    table = pd.read_parquet(documents)
    is_test = table["split"] == "test"
    table.loc[is_test & (table["domain"] == "left"), "text"] = "a"
    table.to_parquet(tmp_path / "documents.parquet", index=False)
    found = tiny.specialisation(model, tokenizer, tmp_path, small()["held_out"])
    assert set(found["held_out"]) == set(found["layers"][0]["counts"]) == {"far", "right"}
    table.loc[is_test & (table["domain"] == "right"), "text"] = "s"
    table.to_parquet(tmp_path / "documents.parquet", index=False)
    found = tiny.specialisation(model, tokenizer, tmp_path, small()["held_out"])
    assert set(found["held_out"]) == {"far"} and found["layers"] == [], "no domain that it was trained on"


def test_too_little_text(documents, tmp_path):
    with pytest.raises(ValueError, match=r"batch_size is 4000: give more text"):
        train(small(batch_size=4000), documents, tmp_path / "model")


# --- parts -----------------------------------------------------------------------------------------------------------


def test_sorted_experts_equal_the_stock_ones():
    torch.manual_seed(0)
    experts = MixtralExperts(MixtralConfig(hidden_size=16, intermediate_size=24, num_local_experts=5))
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    hidden, weights = torch.randn(40, 16), torch.rand(40, 2)
    index = torch.rand(40, 4).topk(2).indices  # the last expert gets no token
    results = []
    for forward in (type(experts).forward, tiny.sorted_experts):
        x = hidden.clone().requires_grad_()
        output = forward(experts, x, index, weights)
        gradients = torch.autograd.grad(output.square().sum(), [x, *experts.parameters()])
        results.append([output, *gradients])
    for mine, stock in zip(*results, strict=True):
        torch.testing.assert_close(mine, stock, rtol=1e-4, atol=1e-3)


def test_cross_entropy_and_its_gradients():
    torch.manual_seed(0)
    targets = torch.randint(0, 50, (1100,))
    results = []
    for loss in (tiny.CrossEntropy.apply, lambda h, w, t: torch.nn.functional.cross_entropy(h @ w.T, t)):
        torch.manual_seed(1)
        hidden, weight = torch.randn(1100, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
        value = 3 * loss(hidden, weight, targets)
        results.append([value, *torch.autograd.grad(value, [hidden, weight])])
    for mine, reference in zip(*results, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(64, 64), (3, 32, 96), (2, 96, 32)])
def test_orthogonal(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape) * 5
    update = muon.orthogonal(matrices)
    assert torch.linalg.svdvals(update).max() < 1.4 and torch.linalg.svdvals(update).median() > 0.6
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(update.flatten(), (u @ v).flatten(), dim=0) > 0.95


def test_pieces_side_by_side_give_the_gradients_of_the_whole(trained, monkeypatch):
    """Each thread has its own routers' outputs; only the balance loss, which is over a piece, may differ."""
    monkeypatch.setattr(tiny, "has_bfloat16", lambda: False)
    config = small(balance=0.0)
    model = tiny.build(config["architecture"], AutoTokenizer.from_pretrained(trained[0]))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    sequences, found = torch.randint(0, 320, (9, 33)), []
    for num_pieces in (1, 2, 3):
        with tiny.pieces_pool(num_pieces) as pool:
            loss, _ = tiny.backward(model, sequences, config["training"], pool, num_pieces)
        found.append([torch.tensor(loss), *(parameter.grad.clone() for parameter in model.parameters())])
    for whole, *pieces in zip(*found, strict=True):
        for other in pieces:
            torch.testing.assert_close(other, whole, rtol=1e-3, atol=1e-6)


def test_balance_loss():
    torch.manual_seed(0)
    even, crowded = torch.randn(4000, 8), torch.randn(4000, 8) + torch.tensor([3.0, 3.0] + [0.0] * 6)
    assert tiny.balance_loss(even, 2).item() == pytest.approx(1, abs=0.02)
    assert tiny.balance_loss(crowded, 2).item() > 2
    crowded.requires_grad_()
    tiny.balance_loss(crowded, 2).backward()
    assert (crowded.grad.sum(0)[:2] > 0).all() and (crowded.grad.sum(0)[2:] < 0).all()


def test_batches_cover_the_text_once_an_epoch():
    sequences = torch.arange(23)[:, None]
    batches = tiny.Batches(sequences, 5, seed=3)
    first, second = (torch.cat([batches[step] for step in range(start, start + 4)]).flatten() for start in (0, 4))
    assert len(first.unique()) == len(second.unique()) == 20 and not torch.equal(first, second)


def test_schedule():
    optimizer = muon.Optimizer(torch.nn.Linear(2, 2), CONFIG["training"] | {"steps": 100, "warmup": 10, "decay": 0.5})
    factors = [optimizer.schedule(step) for step in range(100)]
    assert factors[0] == 0.1 and factors[10] == factors[50] == 1 and 0 < factors[-1] <= 0.02
    assert np.diff(factors[50:]).max() < 0
