"""Perplexity, selection shift and their errors against plain computations; token windows."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tqdm import tqdm

from conftest import write_model
from moepress import config
from moepress.artefacts import Task, read_json
from moepress.data import sampling
from moepress.evaluation import perplexity as ppl
from moepress.evaluation.usage import Usage, count, of_selections
from moepress.inference.checkpoint import fits, load, load_model
from moepress.models import folders, limits
from moepress.models.streaming import ModelStream
from moepress.pruning.policy import attach, experts_of
from moepress.stages import calibration, evaluation
from zoo import write_zoo_model


def test_measure_against_the_model(model_folder):
    model, _ = load(model_folder, "cpu")
    blocks = np.random.default_rng(0).integers(1, 250, (5, 16))
    attach(model, {"method": "pesf", "alpha": 1.0, "renormalize": True})
    measured = ppl.measure(model, 4, blocks, 2, None, tqdm(disable=True))
    for n, block in enumerate(blocks):
        ids = torch.from_numpy(block)[None]
        with torch.inference_mode():
            loss = model(input_ids=ids, labels=ids).loss
        assert measured.nll_N[n] == pytest.approx(loss.item(), abs=1e-4)
    assert measured.selected_NSLK.shape == (5, 16, 2, 2) and measured.selected_NSLK.flags["C_CONTIGUOUS"]
    assert measured.selected_NSLK.max() < 4, "what routers chose, before pruning"
    assert 0.5 <= measured.usage.summary()["active_slots"] < 1
    assert not any(experts._forward_pre_hooks for experts in experts_of(load(model_folder, "cpu")[0])), "nothing stays behind"


def test_strided_blocks_score_every_token_once_with_more_before_it(model_folder):
    """Windows of 8 that begin 3 apart: from the sixth token on, each is scored in one window, behind 5 others or more."""
    model, _ = load(model_folder, "cpu")
    tokenizer, texts = sampling.load_tokenizer(model_folder), ["the experts of a layer", "a router and its bits"]
    blocks, _ = sampling.token_blocks(tokenizer, 0, texts, 8, stride=3)
    stream = [token for text in texts for token in [*tokenizer.encode(text).ids, 0]]
    assert [block.tolist() for block in blocks] == [stream[i : i + 8] for i in range(0, len(stream) - 7, 3)]
    measured = ppl.measure(model, 4, blocks, 4, 3, tqdm(disable=True))
    expected = []
    for start in range(0, len(stream) - 7, 3):
        with torch.inference_mode():
            log_probs = model(torch.tensor([stream[start : start + 8]])).logits[0].float().log_softmax(-1)
        expected.append(-np.mean([float(log_probs[at - 1, stream[start + at]]) for at in (5, 6, 7)]))
    assert np.allclose(measured.nll_N, expected, atol=1e-4)
    assert [ppl.num_scored(8, stride) for stride in (None, 8, 7, 1)] == [7, 7, 7, 1]


def test_a_text_between_documents_is_tokenized_as_the_gptq_papers_do(model_folder):
    from transformers import AutoTokenizer

    rows = ["", " = A title = \n", "the experts of a layer\n", "", "and\ta router\n"]
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    expected = tokenizer("\n\n".join(rows)).input_ids
    blocks, bytes_per_token = sampling.token_blocks(sampling.load_tokenizer(model_folder), "\n\n", rows, 4)
    assert blocks.ravel().tolist() == expected[: len(expected) // 4 * 4] and blocks.shape[1] == 4
    assert bytes_per_token == pytest.approx(len("\n\n".join(rows).encode()) / len(expected))


@given(st.integers(0, 2**32 - 1), st.booleans())
@settings(max_examples=30, deadline=None)
def test_usage_against_loops(seed, is_padded):
    """Index 5 is "no expert": what a policy left out."""
    rng = np.random.default_rng(seed)
    num_sequences, positions, layers = int(rng.integers(1, 5)), int(rng.integers(1, 7)), 3
    chosen = np.stack([rng.permuted(np.arange(5)[None].repeat(layers * num_sequences * positions, 0), axis=1)[:, :2]])
    chosen = chosen.reshape(layers, num_sequences, positions, 2)
    kept = np.where(rng.random(chosen.shape) < 0.3, 5, chosen)
    mask = (np.arange(positions) < rng.integers(1, positions + 1, (num_sequences, 1))).astype(int)
    mask = mask if is_padded else np.ones_like(mask)
    found = Usage()
    for half in (slice(0, num_sequences // 2), slice(num_sequences // 2, None)):
        part = [torch.from_numpy(slots[:, half].reshape(layers, -1, 2).copy()) for slots in (chosen, kept)]
        if len(mask[half]):
            found.add(*(count(slots, len(mask[half]), 5, torch.from_numpy(mask[half])) for slots in part))
    summary = found.summary()
    for layer in range(layers):
        slots = [chosen[layer, n, s] for n in range(num_sequences) for s in range(positions) if mask[n, s]]
        assert summary["expert_use"][layer] == pytest.approx([np.mean(np.concatenate(slots) == e) for e in range(5)])
        without = [[not (kept[layer, n][mask[n] == 1] == e).any() for n in range(num_sequences)] for e in range(5)]
        assert summary["left_out"][layer] == pytest.approx(np.mean(without, axis=1))
    assert summary["active_slots"] == pytest.approx((kept[:, mask == 1] < 5).mean())
    assert summary["num_sequences"] == num_sequences


@pytest.mark.parametrize("family", ["mixtral", "granitemoe", "phimoe", "deepseek_v3", "gpt_oss"])
def test_a_layer_at_a_time_gives_the_same_numbers(family, tmp_path):
    """Its own scaling of embedding and logits, biases of the head, masks and dense layers included."""
    folder = write_zoo_model(tmp_path / "model", family)
    model = load_model(folder)
    blocks = np.random.default_rng(0).integers(1, 250, (5, 16))
    stream = ModelStream(folder)
    whole = ppl.measure(model, stream.shape.num_experts, blocks, 2, 5, tqdm(disable=True))
    nll_N, selected_NSLK = ppl.measure_streamed(stream, blocks, 5, tmp_path / "streams", tqdm(disable=True))
    assert np.allclose(whole.nll_N, nll_N, atol=1e-4)
    assert np.array_equal(np.sort(whole.selected_NSLK), np.sort(selected_NSLK))
    assert whole.selected_NSLK.dtype == selected_NSLK.dtype
    assert whole.usage.summary() == of_selections(selected_NSLK, stream.shape.num_experts).summary()


def test_what_fits_in_memory(model_folder, monkeypatch):
    weights = sum(entry.numel for entry in folders.tensors(model_folder).values())
    for free, expected in ((4 * 1.1 * weights + 1, True), (4 * 1.1 * weights - 1, False)):
        monkeypatch.setattr(limits, "free_memory", lambda free=free: free)
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


def test_text_longer_than_a_models_positions_is_refused_where_only_the_stage_knows_the_model(tmp_path):
    """A hub's model: its config.json is not there when the run is composed."""
    folder = write_model(tmp_path / "model")
    too_long = {"seq_len": 1024}
    with pytest.raises(ValueError, match=r"evaluation\.seq_len=1024: the model has 512 positions"):
        evaluation.test_text(tmp_path, folder, too_long)
    task = SimpleNamespace(config={"calibration": too_long}, inputs={"model": folder, "corpus": tmp_path})
    with pytest.raises(ValueError, match=r"calibration\.seq_len=1024: the model has 512 positions"):
        calibration.run(task)


def test_perplexity_and_its_error():
    nll = np.random.default_rng(0).normal(3, 0.2, 50)
    value, error = ppl.perplexity(nll)
    draws = np.random.default_rng(1).choice(nll, (4000, 50)).mean(1)
    assert value == pytest.approx(np.exp(nll.mean()))
    assert error == pytest.approx(np.exp(draws).std(), rel=0.1)
    assert ppl.perplexity(np.array([2.0, 2.2]))[1] == pytest.approx(0.1 * np.exp(2.1))
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


def test_token_blocks_keep_order_and_count_bytes(model_folder):
    tokenizer = sampling.load_tokenizer(model_folder)
    texts = ["the expert", "a router of bits", "é" * 40]
    blocks, bytes_per_token = sampling.token_blocks(tokenizer, 0, texts, 8)
    joined = [token for text in texts for token in [*tokenizer.encode(text).ids, 0]]
    assert blocks.ravel().tolist() == joined[: blocks.size] and blocks.shape[1] == 8
    assert bytes_per_token == pytest.approx(sum(len(text.encode()) for text in texts) / len(joined))
    assert sampling.token_blocks(tokenizer, 0, texts, 1000)[0].shape == (0, 1000)


def test_no_token_but_the_separator_is_added_around_documents(model_folder):
    from tokenizers.processors import TemplateProcessing

    tokenizer, plain = sampling.load_tokenizer(model_folder), sampling.load_tokenizer(model_folder)
    begin = (plain.id_to_token(1), 1)
    tokenizer.post_processor = TemplateProcessing(single=f"{begin[0]} $A", special_tokens=[begin])
    assert tokenizer.encode("a router").ids[0] == 1, "this tokenizer puts a token first"
    blocks, _ = sampling.token_blocks(tokenizer, 0, ["a router", "and its bits"], 1)
    assert blocks.ravel().tolist() == [*plain.encode("a router").ids, 0, *plain.encode("and its bits").ids, 0]


def test_the_first_of_several_ends_of_document(tmp_path):
    folder = write_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": [7, 0, 5]}))
    assert sampling.end_of_document(folder, sampling.load_tokenizer(folder)) == 7


@given(st.integers(1, 200), st.data())
def test_spread_indices_are_even(count, data):
    wanted = data.draw(st.integers(1, 2 * count))
    found = sampling.spread(count, wanted)
    gaps = np.diff([*found, count])
    assert found[0] == 0 and len(found) == min(wanted, count) and gaps.max() - gaps.min() <= 1 and gaps.min() > 0
    assert len(np.empty((0, 4))[sampling.spread(0, wanted)]) == 0, "of nothing, nothing"


def test_one_block_of_text_has_no_scatter(tmp_path, model_folder):
    rows = [("only", "test", "0", "the expert router layer token bits width " * 40)]
    (tmp_path / "corpus").mkdir()
    pd.DataFrame(rows, columns=["domain", "split", "document", "text"]).to_parquet(tmp_path / "corpus" / "documents.parquet")
    settings = config.resolve(["evaluation.seq_len=32", "evaluation.num_blocks=1", "evaluation.tasks=none"])["evaluation"]
    inputs = {"corpus": tmp_path / "corpus", "checkpoint": model_folder}
    for name in ("16bit", "compressed"):
        out = tmp_path / name
        out.mkdir()
        evaluation.run(Task("evaluation", "0", {"evaluation": settings}, inputs, {"device": "cpu", "cache": "."}, out))
        inputs["reference"] = out
    found = read_json(tmp_path / "compressed" / "metrics.json")
    assert found["domains"]["only"]["num_blocks"] == 1
    assert found["selection_shift"] == found["selection_shift_stderr"] == found["domains"]["only"]["ppl_stderr"] == 0


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
