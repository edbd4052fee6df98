"""Perplexity, selection shift and their errors against plain computations; token windows."""

import json
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from tqdm import tqdm

from conftest import write_model
from moepress.data import sampling
from moepress.evaluation import perplexity as ppl
from moepress.inference.checkpoint import fits, load, load_model
from moepress.models import families
from moepress.models.streaming import ModelStream
from moepress.pruning.policy import attach
from zoo import write_zoo_model


def test_measure_against_the_model(model_folder):
    model, _ = load(model_folder, "cpu")
    blocks = np.random.default_rng(0).integers(1, 250, (5, 16))
    before, after = ppl.SelectionTap(), ppl.SelectionTap()
    before.watch(model)
    attach(model, {"method": "pesf", "alpha": 1.0, "renormalize": True})
    after.watch(model)
    measured = ppl.measure(model, 4, before, after, blocks, 2, tqdm(disable=True))
    for n, block in enumerate(blocks):
        ids = torch.from_numpy(block)[None]
        with torch.inference_mode():
            loss = model(input_ids=ids, labels=ids).loss
        assert measured.nll_N[n] == pytest.approx(loss.item(), abs=1e-4)
    assert measured.selected_NSLK.shape == (5, 16, 2, 2) and measured.selected_NSLK.flags["C_CONTIGUOUS"]
    assert measured.selected_NSLK.max() < 4, "what routers chose, before pruning"
    assert 0.5 <= measured.active < 1


@pytest.mark.parametrize("family", ["mixtral", "granitemoe", "phimoe", "deepseek_v3", "gpt_oss"])
def test_a_layer_at_a_time_gives_the_same_numbers(family, tmp_path):
    """Its own scaling of embedding and logits, biases of the head, masks and dense layers included."""
    folder = write_zoo_model(tmp_path / "model", family)
    model = load_model(folder)
    blocks = np.random.default_rng(0).integers(1, 250, (5, 16))
    before, after = ppl.SelectionTap(), ppl.SelectionTap()
    before.watch(model), after.watch(model)
    stream = ModelStream(folder)
    whole = ppl.measure(model, stream.shape.num_experts, before, after, blocks, 2, tqdm(disable=True))
    streamed = ppl.measure_streamed(stream, blocks, tmp_path / "streams", tqdm(disable=True))
    assert np.allclose(whole.nll_N, streamed.nll_N, atol=1e-4)
    assert np.array_equal(np.sort(whole.selected_NSLK), np.sort(streamed.selected_NSLK))
    assert whole.selected_NSLK.dtype == streamed.selected_NSLK.dtype


def test_what_fits_in_memory(model_folder, monkeypatch):
    weights = sum(entry.numel for entry in families.tensors(model_folder).values())
    for free, expected in ((4 * 1.1 * weights + 1, True), (4 * 1.1 * weights - 1, False)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        assert fits(model_folder, "cpu") == expected


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    folder = write_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 280}))
    with pytest.raises(ValueError, match=r"tokenizer\.json has the token \d+ .* vocab_size=280: it is another model's"):
        sampling.check_tokenizer(folder, sampling.load_tokenizer(folder))
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 9999}))
    with pytest.raises(ValueError, match=r"config\.json: eos_token_id=9999 is no token of tokenizer\.json"):
        sampling.end_of_document(folder, sampling.load_tokenizer(folder))
    config.pop("eos_token_id")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").unlink()
    assert sampling.end_of_document(folder, sampling.load_tokenizer(folder)) == 0, "the one that tokenizer_config.json names"


def test_perplexity_and_its_error():
    nll = np.random.default_rng(0).normal(3, 0.2, 50)
    value, error = ppl.perplexity(nll)
    draws = np.random.default_rng(1).choice(nll, (4000, 50)).mean(1)
    assert value == pytest.approx(np.exp(nll.mean()))
    assert error == pytest.approx(np.exp(draws).std(), rel=0.1)
    assert ppl.perplexity(np.array([2.0]))[1] == 0


def test_selection_shift_against_sets():
    rng = np.random.default_rng(0)
    a, b = (np.stack([rng.permutation(8)[:3] for _ in range(2 * 5 * 4)]).reshape(2, 5, 4, 3) for _ in range(2))
    shift = ppl.selection_shift(a, b)
    for n in range(2):
        for layer in range(4):
            expected = np.mean([1 - len(set(a[n, s, layer]) & set(b[n, s, layer])) / 3 for s in range(5)])
            assert shift[n, layer] == pytest.approx(expected)
    assert (ppl.selection_shift(a, a[..., ::-1]) == 0).all(), "the order of a selection does not count"


def test_expert_use():
    selected = np.zeros((1, 4, 2, 2), np.uint8)
    selected[..., 1] = 3
    assert ppl.expert_use(selected, 4) == [[0.5, 0, 0, 0.5]] * 2


def test_token_blocks_keep_order_and_count_bytes(model_folder):
    tokenizer = sampling.load_tokenizer(model_folder)
    texts = ["the expert", "a router of bits", "é" * 40]
    blocks, num_bytes = sampling.token_blocks(tokenizer, 0, texts, 8)
    joined = [token for text in texts for token in [*tokenizer.encode(text).ids, 0]]
    assert blocks.ravel().tolist() == joined[: blocks.size] and blocks.shape[1] == 8
    total = sum(len(text.encode()) for text in texts)
    assert num_bytes == round(total * blocks.size / len(joined))


def test_calibration_sample():
    blocks = {"a": np.arange(40).reshape(10, 4), "b": 100 + np.arange(40).reshape(10, 4)}
    tokens, origin = sampling.sample_calibration(blocks, 7, seed=0)
    assert tokens.shape == (7, 4) and [d for d, _ in origin].count("a") == 3
    assert all((tokens[i] == blocks[d][b]).all() for i, (d, b) in enumerate(origin))
    assert len(set(origin)) == 7, "drawn without repetition"
    again, _ = sampling.sample_calibration(blocks, 7, seed=0)
    other, _ = sampling.sample_calibration(blocks, 7, seed=1)
    assert (again == tokens).all() and (other != tokens).any()
    with pytest.raises(ValueError, match=r"num_sequences=30 with calibration\.seq_len=4 needs 15 .*'a'.*has 10"):
        sampling.sample_calibration(blocks, 30, seed=0)
