"""A loaded or streamed model as lm-eval asks it, with its pruning policy active.

Two things differ from lm-eval's own model class (which runs models through accelerate). Each request is run with the mask of
its padding, and so without any influence of the others in its batch: lm-eval gives none, and a policy that counts experts would
count padding. And as many tokens go through the model at once as memory allows, instead of a fixed number of requests.
"""

from collections import defaultdict
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from shutil import rmtree

import numpy as np
import psutil
import torch
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from moepress.evaluation.usage import Usage, count, watched
from moepress.models.streaming import ModelStream
from moepress.models.streams import run_layers
from moepress.pruning.policy import experts_of

STREAMED_TOKENS = 2**18
"""Of a model that is streamed, so many go through its layers at once: what a usual calibration sample has."""


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
        """For each request `(_, context, continuation)` the log-probability of the continuation, and whether greedy decoding
        gives it.

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
            rmtree(folder, ignore_errors=True)

        return logits(), (chosen_BLE, chosen_BLE)


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
