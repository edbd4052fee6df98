"""The packed folder: whole or refused by name, the same by every way of loading, saved as it was."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import moepress
from moepress.inference import manifest, saving
from moepress.inference.packed import PackedExperts, PackedLinear

TOKENS = torch.randint(1, 250, (2, 24), generator=torch.Generator().manual_seed(0))
FIRST = "model-00001-of-00003.safetensors"


@pytest.fixture
def copy(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copy")


def plain(folder, **settings):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings)


def loaded(folder, **settings):
    return moepress.load(folder, "cpu", **settings)[0]


def logits(model):
    with torch.inference_mode():
        return model(TOKENS).logits


def change_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value, indent=1) + "\n")


def flip(path, place):
    """Another byte at `place`, the size kept."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def set_version(version):
    return lambda f: change_json(f / "config.json", lambda c: c["quantization_config"].update(format_version=version))


def swap_in_config(old, new):
    def damage(folder):
        text = (folder / "config.json").read_text()
        assert old in text and len(old) == len(new)
        (folder / "config.json").write_text(text.replace(old, new))

    return damage


def relabel(folder):
    change_json(folder / manifest.INDEX, lambda i: i["weight_map"].update({"lm_head.weight": FIRST}))


DAMAGE = {
    "a shard is missing": (lambda f: (f / FIRST).unlink(), rf"{FIRST}: missing"),
    "the tokenizer is missing": (lambda f: (f / "tokenizer.json").unlink(), r"tokenizer\.json: missing"),
    "truncated": (lambda f: os.truncate(f / FIRST, 5000), rf"{FIRST}: truncated, 5000 bytes"),
    "empty": (lambda f: os.truncate(f / FIRST, 0), rf"{FIRST}: truncated, 0 bytes"),
    "altered weights": (lambda f: flip(f / FIRST, -1), rf"{FIRST}: altered, its sha256"),
    "altered tokenizer": (lambda f: flip(f / "tokenizer.json", -3), r"tokenizer\.json: altered.*manifest\.seal"),
    "altered configuration": (swap_in_config('"rms_norm_eps": 1e-05', '"rms_norm_eps": 1e-03'), r"config\.json: altered"),
    "altered index": (relabel, rf"index\.json: altered, it disagrees with {FIRST} about the tensor lm_head\.weight"),
    "index without hashes": (
        lambda f: change_json(f / manifest.INDEX, lambda i: i["metadata"].pop("files")),
        r"index\.json: has no metadata\.files",
    ),
    "index without a shard's hash": (
        lambda f: change_json(f / manifest.INDEX, lambda i: i["metadata"]["files"].pop(FIRST)),
        rf"index\.json: has no size and hash for {FIRST}",
    ),
    "index that points elsewhere": (
        lambda f: change_json(f / manifest.INDEX, lambda i: i["metadata"]["files"].update({"../x": {}})),
        r"metadata\.files\['\.\./x'\]",
    ),
    "stray shard": (lambda f: shutil.copy(f / FIRST, f / "model-00009.safetensors"), r"model-00009\.safetensors: unexpected"),
    "stray whole model": (lambda f: shutil.copy(f / FIRST, f / "model.safetensors"), r"model\.safetensors: unexpected"),
    "stray pickle": (lambda f: (f / "pytorch_model.bin").write_bytes(pickle.dumps({})), r"pytorch_model\.bin: unexpected"),
    "newer": (set_version(99), r"format version 99.*update moepress"),
    "older": (set_version(1), r"format version 1 .*quantize the model again"),
    "no version": (set_version(None), r"format_version=None is no version"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_by_name_on_both_ways(copy, damage):
    apply, message = DAMAGE[damage]
    apply(copy)
    for way in (loaded, plain):
        with pytest.raises(ValueError, match=message):
            way(copy)


def test_a_gpu_that_is_not_there_is_named(checkpoint, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device='cuda': torch finds no GPU here"):
        moepress.load(checkpoint, "cuda")


def test_load_refuses_what_transformers_cannot_hand_to_us(copy):
    (copy / manifest.INDEX).unlink()
    with pytest.raises(ValueError, match=r"index\.json: missing"):
        loaded(copy)
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        plain(copy)
    os.truncate(copy / "config.json", 50)
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
        loaded(copy)


def test_a_configuration_that_lost_its_quantization_is_refused(copy):
    change_json(copy / "config.json", lambda c: c.pop("quantization_config"))
    with pytest.raises(ValueError, match=r"config\.json: truncated"):
        loaded(copy)


def test_without_hashing_names_sizes_and_headers_are_still_compared(copy):
    flip(copy / FIRST, -1)
    loaded(copy, verify=False)
    os.truncate(copy / FIRST, 5000)
    with pytest.raises(ValueError, match="truncated"):
        loaded(copy, verify=False)


def test_a_change_that_is_meant_can_be_sealed(copy):
    change_json(copy / "generation_config.json", lambda c: c.update(max_new_tokens=3))
    with pytest.raises(ValueError, match=r"generation_config\.json: altered"):
        loaded(copy)
    manifest.seal(copy)
    assert loaded(copy).generation_config.max_new_tokens == 3


CODES = "model.layers.0.mlp.experts.down.codes"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(CODES), rf"missing tensors \['{re.escape(CODES)}'\]"),
        (lambda t: t.update(more=torch.zeros(2)), r"unexpected tensors \['more'\]"),
        (lambda t: t.update({CODES: t[CODES][:-1]}), rf"the tensor {re.escape(CODES)} is \[\d+\], its module takes"),
        (lambda t: t.update({CODES: t[CODES].to(torch.int64)}), rf"{re.escape(CODES)} is stored as I64"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_on_both_ways(copy, change, message):
    """Written and sealed by somebody whose writer is wrong: the hashes are right."""
    tensors = load_file(copy / FIRST)
    change(tensors)
    saving.write_shard(copy, FIRST, tensors)
    for way in (loaded, plain):
        with pytest.raises(ValueError, match=message):
            way(copy)


def unpacked(stream, count, width):
    """The codes in a stream's first bytes, and the bytes after them, as docs/format.md says it."""
    codes = np.zeros(count, int)
    for power in (8, 4, 2, 1):
        if width & power:
            size = -(-count * power // 8)
            bits = np.unpackbits(stream[:size], bitorder="little")[: count * power].reshape(count, power)
            codes, stream = codes << power | bits @ (1 << np.arange(power)), stream[size:]
    return codes, stream


def test_a_reader_written_from_the_page(checkpoint):
    """Experts and linears of a layer, decoded by numpy alone, are what the model computes with."""
    model, tensors = loaded(checkpoint), load_file(checkpoint / FIRST)
    quantization = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    assert unpacked(np.array([0x32, 1, 7], np.uint8), 5, 3)[0].tolist() == [5, 1, 7, 0, 2]
    for name, widths in quantization["modules"].items():
        if not name.startswith("model.layers.0."):
            continue
        matrices = [f"{name}.gate_up", f"{name}.down"] if isinstance(widths, list) else [name]
        for matrix in matrices:
            codes, zeros, scales = (tensors[f"{matrix}.{part}"].numpy() for part in ("codes", "zeros", "scales"))
            for e, width in enumerate(widths if isinstance(widths, list) else [widths]):
                groups = scales[e].size
                code, codes = unpacked(codes, groups * quantization["group_size"], width)
                zero, zeros = unpacked(zeros, groups, width + 2)
                found = scales[e].reshape(-1, 1).astype(np.float32) * (code.reshape(groups, -1) - zero[:, None] / np.float32(4))
                used = model.get_submodule(matrix).matrix(e, torch.float32).numpy()
                assert np.array_equal(found.astype(np.float32).reshape(used.shape), used), (matrix, e)
            assert not len(codes) and not len(zeros)


def test_the_index_does_not_depend_on_the_order_of_writing(checkpoint, tmp_path):
    """As after a kill between a shard and the state that says it is done."""
    shards = sorted(path.name for path in checkpoint.glob("*.safetensors"))
    for name in (shards[0], shards[0], *reversed(shards)):
        saving.write_shard(tmp_path, name, load_file(checkpoint / name))
    for name in manifest.BESIDE:
        if (checkpoint / name).is_file():
            shutil.copy(checkpoint / name, tmp_path)
    manifest.seal(tmp_path)
    assert (tmp_path / manifest.INDEX).read_bytes() == (checkpoint / manifest.INDEX).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, "auto"])
def test_saving_a_loaded_model_gives_the_same_bytes(checkpoint, tmp_path, dtype):
    model, _ = moepress.load(checkpoint, "cpu", dtype=dtype)
    model.save_pretrained(tmp_path, max_shard_size="1KB")
    shards = sorted(path.name for path in checkpoint.glob("*.safetensors"))
    assert shards == sorted(path.name for path in tmp_path.glob("*.safetensors"))
    for name in shards:
        assert (tmp_path / name).read_bytes() == (checkpoint / name).read_bytes(), name
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (checkpoint, tmp_path))
    assert after["quantization_config"] == before["quantization_config"] and after["dtype"] == "bfloat16"
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path)
    assert torch.equal(logits(loaded(tmp_path)), logits(loaded(checkpoint)))
    loaded(tmp_path).save_pretrained(tmp_path)
    assert (tmp_path / FIRST).read_bytes() == (checkpoint / FIRST).read_bytes(), "onto itself"


def test_only_what_was_loaded_is_saved(checkpoint, tmp_path):
    model = loaded(checkpoint)
    with pytest.raises(ValueError, match="push_to_hub=True"):
        model.save_pretrained(tmp_path, push_to_hub=True)
    (tmp_path / "model.safetensors").write_bytes(b"of another model")
    with pytest.raises(ValueError, match=r"model\.safetensors: unexpected"):
        model.save_pretrained(tmp_path)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(300))
    with pytest.raises(ValueError, match=r"lm_head\.bias was added or removed"):
        model.save_pretrained(tmp_path / "new")


SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 32, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2, "first_k_dense_replace": 0}
SIZES |= {"n_group": 1, "topk_group": 1, "tie_word_embeddings": True}
FAMILIES = {
    "minimax": {"num_local_experts": 4, "block_size": 8},
    "qwen3_moe": {"num_experts": 4, "head_dim": 16},
    "deepseek_v3": {"n_routed_experts": 4, "n_shared_experts": 1, "kv_lora_rank": 8, "q_lora_rank": 8},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_is_a_fixed_point_for_families_that_transformers_renames(tmp_path, family):
    config = AutoConfig.for_model(family, **SIZES, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config)
    modules = {"model.layers.0.mlp.experts": [1, 2, 3, 4]}
    modules |= {
        n: 4 for n, m in model.named_modules() if n.startswith("model.layers.0.self_attn") and type(m) is torch.nn.Linear
    }
    for name, bits in modules.items():
        module = model.get_submodule(name)
        packed = PackedLinear if isinstance(module, torch.nn.Linear) else PackedExperts
        model.set_submodule(name, packed(module, bits, 8))
    made, saved = tmp_path / "made", tmp_path / "saved"
    config.quantization_config = {"quant_method": "moepress", "format_version": 2, "group_size": 8, "modules": modules}
    config.save_pretrained(made)
    tensors = {n: torch.nan_to_num(t) for n, t in model.state_dict().items() if n != "lm_head.weight"}
    saving.write_shard(made, "model-00001-of-00001.safetensors", tensors)
    manifest.seal(made)
    plain(made).save_pretrained(saved)
    (shard,) = (path.name for path in made.glob("*.safetensors"))
    assert (saved / shard).read_bytes() == (made / shard).read_bytes()
    assert torch.equal(plain(saved).lm_head.weight, tensors["model.embed_tokens.weight"].float())


def test_loading_converts_nothing(checkpoint):
    """Names are the modules'; no renaming, transformers' or the caller's, gets hold of them."""
    model = plain(checkpoint, key_mapping={"layers.0": "layers.1"})
    assert torch.equal(logits(model), logits(loaded(checkpoint)))


ORDERS = {
    "moepress first": "import moepress; from transformers import AutoModelForCausalLM",
    "transformers first": "from transformers import AutoModelForCausalLM, modeling_utils; import moepress",
}


def test_import_moepress_is_enough_in_either_order(checkpoint, tmp_path):
    torch.save(logits(loaded(checkpoint)), tmp_path / "logits.pt")
    code = (
        "import torch, sys; assert 'moepress.inference.checkpoint' not in sys.modules\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(checkpoint)!r}, dtype=torch.float32)\n"
        "assert type(model.get_submodule('model.layers.0.mlp.experts')).__name__ == 'PackedExperts'\n"
        f"tokens, expected = torch.tensor({TOKENS.tolist()}), torch.load({str(tmp_path / 'logits.pt')!r})\n"
        "with torch.inference_mode(): assert torch.equal(model(tokens).logits, expected)"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", f"{order}\n{code}"], stderr=subprocess.PIPE, text=True)
        for order in ORDERS.values()
    ]
    for order, process in zip(ORDERS, running, strict=True):
        _, errors = process.communicate()
        assert process.returncode == 0, f"{order}: {errors}"


def test_without_moepress_transformers_stops(checkpoint, tmp_path):
    """It does not know the format, and would fill what it does not find with random weights."""
    loaded(checkpoint).save_pretrained(tmp_path)
    code = "from transformers import AutoModelForCausalLM; import sys; AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(folder)], stderr=subprocess.PIPE, text=True)
        for folder in (checkpoint, tmp_path)
    ]
    for process in running:
        _, errors = process.communicate()
        assert process.returncode != 0
        assert "import moepress before this folder is loaded" in errors.splitlines()[-1]


def test_from_the_cache_of_the_hub(checkpoint, tmp_path, monkeypatch):
    """There the files are links into a store, and only those that transformers asked for."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--org--name"
    snapshot, blobs = repository / "snapshots" / ("0" * 40), repository / "blobs"
    for folder in (snapshot, blobs, repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    for path in [*checkpoint.glob("model*"), checkpoint / "config.json"]:
        shutil.copy(path, blobs)
        (snapshot / path.name).symlink_to(blobs / path.name)
    model = plain("org/name", cache_dir=tmp_path, local_files_only=True)
    assert torch.equal(logits(model), logits(loaded(checkpoint)))
    flip(blobs / FIRST, -1)
    with pytest.raises(ValueError, match=rf"{FIRST}: altered"):
        plain("org/name", cache_dir=tmp_path, local_files_only=True)


def continued(model, ids, num_tokens):
    for _ in range(num_tokens):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids


@torch.inference_mode()
def test_generation(checkpoint):
    model, tokenizer = moepress.load(checkpoint, "cpu")
    model.generation_config.eos_token_id = None
    ids = tokenizer("expert router layer", return_tensors="pt").input_ids
    generated = model.generate(ids, max_new_tokens=20, do_sample=False)
    assert generated.shape[1] == ids.shape[1] + 20
    assert generated.tolist() == continued(model, ids, 20).tolist()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.inference_mode()
def test_on_cuda(checkpoint, tmp_path):
    model, _ = moepress.load(checkpoint, "cuda", dtype=torch.float32)
    assert all(t.is_cuda for t in model.state_dict().values())
    assert torch.allclose(model(TOKENS.cuda()).logits.cpu(), logits(loaded(checkpoint)), atol=1e-3)
    direct = plain(checkpoint, device_map="cuda")
    assert torch.equal(direct(TOKENS.cuda()).logits, model(TOKENS.cuda()).logits)
    assert model.generate(TOKENS[:1].cuda(), max_new_tokens=20, eos_token_id=None).shape[1] == TOKENS.shape[1] + 20
    model.save_pretrained(tmp_path)
    assert (tmp_path / FIRST).read_bytes() == (checkpoint / FIRST).read_bytes()
