"""A small random Mixtral with its tokenizer, and a small corpus: what most tests run on."""

import os
import shutil
import signal
import sys
import time

# Read when numpy and torch are first imported. Models are small and the suite runs a process for each core: a second thread
# would only wait. Stages that tests start as processes have it, too, so bytes can be compared.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():  # read when triton is first imported, whoever does it
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell starts what is to run in the background with Ctrl-C ignored, and what the tests start, and stop, would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def write_model(folder, *, layers=2, hidden=64, intermediate=32, experts=4, top_k=2, seed=0, dtype="bfloat16", vocab=300):
    """A random Mixtral in Hugging Face form, with a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import MixtralConfig, MixtralForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([" ".join(WORDS) * 3], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}')
    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=experts,
        num_experts_per_tok=top_k,
        eos_token_id=0,
        bos_token_id=0,
        max_position_embeddings=512,
        initializer_range=0.2,
    )
    MixtralForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


WORDS = [
    "the",
    "a",
    "of",
    "to",
    "and",
    "in",
    "expert",
    "router",
    "layer",
    "token",
    "bits",
    "width",
    "scale",
    "zero",
    "group",
    "mixture",
    "press",
    "small",
    "fast",
    "proof",
    "cost",
]


def write_texts(folder, documents=60, words=300, seed=0):
    """Two domains of random words, a file a document."""
    rng = np.random.default_rng(seed)
    for domain, vocabulary in (("even", WORDS[::2]), ("odd", WORDS[1::2])):
        (folder / domain).mkdir(parents=True, exist_ok=True)
        for number in range(documents):
            text = " ".join(rng.choice(vocabulary, words))
            (folder / domain / f"{number}.txt").write_text(f"{domain} {number} {text}")
    return folder


def until(told, *processes, seconds=120):
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not (found := told()):
        assert time.monotonic() < end, "it did not come to that"
        assert not processes or any(p.poll() is None for p in processes), "ended before it came to that"
        time.sleep(0.02)
    return found


def bytes_outside_experts(shape, tensors, quantization):
    """Bytes of everything that is no expert's matrix, counted tensor by tensor: attention, shared experts and dense layers
    packed, the rest as it is. tensors: as `folders.tensors` has them. quantization: as in conf/quantization/.
    """
    from moepress.models.families import FAMILIES, kind_of
    from moepress.quantization.size import matrix_bytes

    family, group_size = FAMILIES[shape.family], quantization["group_size"]
    total = 0
    for name, entry in tensors.items():
        kind = kind_of(family, name, entry.shape, group_size)
        bits = quantization.get(f"{kind}_bits")
        if kind != "expert":
            total += matrix_bytes(*entry.shape, bits, group_size) if bits else entry.nbytes
    return total


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts"))


SMALL = [
    "allocation=pmq",
    "quantization=qesc",
    "quantization.group_size=32",
    "calibration.num_sequences=8",
    "calibration.seq_len=64",
    "evaluation.seq_len=64",
    "evaluation.num_blocks=4",
    "evaluation.tasks=none",
    "latency.prefill_len=32",
    "latency.prefill_batch=2",
    "latency.decode_batch=1",
    "latency.decode_len=8",
    "latency.decode_tokens=2",
    "latency.buffer=1MiB",
    "latency.repeats=1",
    "latency.threads=1",
]
"""An experiment on these that takes seconds."""


def small_experiment(model_folder, text_folder):
    """Its overrides, model and corpus included."""
    fractions = "corpus.fractions={train: 0.6, calibration: 0.2, test: 0.2}"
    source = [f"model.path={model_folder}", "corpus=local", f"corpus.path={text_folder}", fractions]
    return ["model=local", *source, *SMALL]


@pytest.fixture(scope="session")
def made(tmp_path_factory, model_folder, text_folder):
    """An experiment by the real stages: its overrides, its report's folder, and the checkpoint."""
    from moepress import artefacts, plan

    place = tmp_path_factory.mktemp("made")
    overrides = [*small_experiment(model_folder, text_folder), "device=cpu", "quantization=qesc", "allocation.bits=2.5"]
    overrides.append(f"paths.results={place}")
    planned = plan.for_overrides(overrides)
    for folder in planned.artefacts:
        artefacts.run_stage(artefacts.task_path(place, folder), place / folder)
    (checkpoint,) = place.glob("quantization/*")
    return overrides, place / planned.report.removeprefix(f"{place}/"), checkpoint


@pytest.fixture
def in_parts(monkeypatch):
    """So few tokens at once that all who take their text in parts have several of it, as with the text of a real run."""
    for name, module in list(sys.modules.items()):
        if name.startswith("moepress.") and hasattr(module, "TOKENS_AT_ONCE"):
            monkeypatch.setattr(module, "TOKENS_AT_ONCE", 50)


@pytest.fixture
def finished(made, tmp_path):
    """A working folder with a copy of its results, all of them there, and its overrides."""
    overrides, report, _ = made
    shutil.copytree(report.parent.parent, tmp_path / "results")
    return tmp_path, [override for override in overrides if not override.startswith("paths.results=")]


@pytest.fixture(scope="session")
def checkpoint(made):
    return made[2]
