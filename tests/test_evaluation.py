"""Perplexity, selection shift and their errors against plain computations; token windows."""

import numpy as np
import pytest
import torch
from tqdm import tqdm

from moepress.data import sampling
from moepress.evaluation import perplexity as ppl
from moepress.inference.checkpoint import load
from moepress.pruning.policy import attach


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
