"""What the latency stage says beside its times: each number against a slow count of the same. And layers of real shapes."""

import json

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moepress import artefacts, cli, dag, studies
from moepress.commands import latency as asking
from moepress.config import resolve, values
from moepress.inference.checkpoint import load_model
from moepress.latency import building, device, measuring, shapes, traffic
from moepress.latency.graphs import StaticDecoding
from moepress.models import limits
from moepress.models.experts import ON_CPU
from moepress.pruning.policy import attach, experts_of, routers_of
from moepress.quantization.packing import pack, unpack
from moepress.quantization.size import zero_width
from moepress.stages import latency as stage
from zoo import write_zoo_model

SHAPE = {
    "model_type": "qwen2_moe",
    "hidden_size": 64,
    "intermediate_size": 48,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "vocab_size": 300,
}
SIZES = {"group_size": 16, "attention_bits": 4, "shared_bits": 4}
WIDTHS = [4, 3, 3, 2, 2, 2, 1, 8]
PESF = {"method": "pesf", "alpha": 0.9, "renormalize": True}


@pytest.fixture(scope="module")
def layers() -> dict:
    """Two layers at 16 bits and packed, the routing skewed."""
    config = shapes.layers_only(SHAPE, 2, building.VOCAB)
    found = {
        "16bit": building.build(config, torch.float32, "cpu", None, SIZES),
        "packed": building.build(config, torch.float32, "cpu", WIDTHS, SIZES),
    }
    for model in found.values():
        building.SkewedRouting(model, 1.0)
    found["16bit"].set_experts_implementation(ON_CPU)
    return found


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(building.VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


def bytes_of_expert(experts, e: int) -> int:
    """Counted on what packing its codes and zero points anew gives."""
    if not hasattr(experts, "gate_up"):
        return experts.gate_up_proj[e].nbytes + experts.down_proj[e].nbytes
    total = 0
    for part in (experts.gate_up, experts.down):
        bits, groups = part.bits[e], part.rows * part.columns // part.group_size
        codes = unpack(part.codes[part.code_starts[e] : part.code_starts[e + 1]], part.rows * part.columns, bits)
        zeros = unpack(part.zeros[part.zero_starts[e] : part.zero_starts[e + 1]], groups, zero_width(bits))
        total += pack(codes, bits).numel() + pack(zeros, zero_width(bits)).numel() + part.scales[e].nbytes
    return total


@pytest.mark.parametrize("kind", ["16bit", "packed"])
@pytest.mark.parametrize("num_prompt", [0, 5])
def test_bytes_to_move_token_by_token(layers, kind, num_prompt):
    """Of a prefill, and of the steps of decoding: each token's experts by themselves, other tensors by name."""
    model, ids_BS, chosen = layers[kind], tokens(2, 7), []
    variant = measuring.Variant(kind, model)
    handles = [router.register_forward_hook(lambda _, args, out: chosen.append(out[2])) for router in routers_of(model)]
    with torch.inference_mode():
        one = measuring.Decode(variant, ids_BS, num_prompt) if num_prompt else measuring.Prefill(variant, ids_BS)
        found, cached = one.look()
    for handle in handles:
        handle.remove()
    steps, past = (2, range(5, 7)) if num_prompt else (1, [0])
    chosen = chosen[-2 * steps :]
    experts, counted = experts_of(model), 0
    for call, index_TK in enumerate(chosen):
        read = set()
        for token in index_TK.tolist():
            read |= set(token)
        counted += sum(bytes_of_expert(experts[call % 2], e) for e in read)
    assert found.experts == counted / steps
    names = [n for n in model.state_dict() if ".experts." not in n and "embed_tokens" not in n]
    rest = sum(model.state_dict()[n].nbytes for n in names) + model.model.rotary_emb.inv_freq.nbytes
    rest += model.model.rotary_emb.original_inv_freq.nbytes
    new = ids_BS.numel() if not num_prompt else len(ids_BS)
    assert found.rest == rest + new * 64 * 4
    per_position = 2 * 2 * 2 * 2 * 16 * 4  # sequences, layers, keys and values, heads, their size, float32
    assert cached == 7 * per_position
    assert found.cache == per_position * (np.mean([p + 1 for p in past]) if num_prompt else 7)


def test_pruned_experts_need_not_move(layers, monkeypatch):
    """Those that the policy leaves out are not unpacked, and not counted."""
    model, ids_BS = layers["packed"], tokens(2, 40)
    variant, read = measuring.Variant("pruned", model, policy=PESF), [set(), set()]
    for experts, found in zip(experts_of(model), read, strict=True):
        unpacked = experts.gate_up_matrix
        monkeypatch.setattr(experts, "gate_up_matrix", lambda e, dtype, f=found, u=unpacked: (f.add(e), u(e, dtype))[1])
    with variant.ready(), torch.inference_mode():
        pruned, _ = measuring.Prefill(variant, ids_BS).look()
    expected = sum(bytes_of_expert(experts, e) for experts, found in zip(experts_of(model), read, strict=True) for e in found)
    assert pruned.experts == expected and pruned.used == np.mean([len(found) for found in read])
    with torch.inference_mode():
        whole, _ = measuring.Prefill(measuring.Variant("whole", model), ids_BS).look()
    assert pruned.experts < whole.experts and pruned.flops < whole.flops, "the policy was there, and is gone"


def test_operations_against_torchs_counter(layers):
    """torch counts both halves of the causal attention, of which one is masked."""
    model, (B, S) = layers["16bit"], (2, 9)
    model.set_attn_implementation("eager")
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        found, _ = measuring.Prefill(measuring.Variant("16bit", model), tokens(B, S)).look()
    model.set_attn_implementation("sdpa")
    heads, size, layers_built = 4, 16, 2
    other_half = layers_built * 2 * B * heads * 2 * size * (S * S - S * (S + 1) // 2)
    assert found.flops == counter.get_total_flops() - other_half


def test_parts_sum_up(layers):
    for model in layers.values():
        parts = traffic.Parts(model)
        table = model.get_input_embeddings().weight.nbytes
        assert parts.rest_bytes + table + sum(map(sum, parts.expert_bytes)) == traffic.weight_bytes(model)


@pytest.mark.parametrize("kind", ["16bit", "packed"])
@pytest.mark.parametrize("policy", [None, PESF])
def test_static_decoding_is_decoding(layers, kind, policy):
    """The path that a CUDA graph captures gives the ordinary one's output, as often as it is set back."""
    model, ids_BS = layers[kind], tokens(2, 12)
    attached = attach(model, policy or {"method": "none"})
    ordinary = measuring.Decode(measuring.Variant(kind, model), ids_BS, 8)
    with torch.inference_mode():
        ordinary.restart()
        expected = [ordinary.step(place).logits for place in range(8, 12)]
        ordinary.restart()
        again = [ordinary.step(place).logits for place in range(8, 12)]
        static = StaticDecoding(model, ids_BS, 8)
        for _ in range(2):
            torch.testing.assert_close(torch.stack(static.run(keep=True)), torch.stack(expected), rtol=1e-4, atol=1e-4)
        whole = model(input_ids=ids_BS).logits
    attached.remove()
    assert torch.equal(torch.stack(again), torch.stack(expected)), "the cache is cut back"
    if policy is None:
        torch.testing.assert_close(whole[:, 8:], torch.cat(expected, 1), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_a_running_state_is_computed_again_and_counts_as_cache(tmp_path):
    """Linear attention keeps no past to cut back to; what it keeps is as large behind any prompt."""
    model, ids_BS = load_model(write_zoo_model(tmp_path, "qwen3_next")), tokens(2, 12) % 300
    one = measuring.Decode(measuring.Variant("16bit", model), ids_BS, 8)
    with pytest.raises(ValueError, match="linear attention"):
        StaticDecoding(model, ids_BS, 8)
    for _ in range(2):
        one.restart()
        found = torch.cat([one.step(place).logits for place in range(8, 12)], 1)
        torch.testing.assert_close(found, model(input_ids=ids_BS).logits[:, 8:], rtol=1e-4, atol=1e-4)
    sizes = [measuring.Prefill(measuring.Variant("16bit", model), ids_BS[:, :S]).look() for S in (6, 12)]
    heads, kernel, key, value = 4, 4, 16, 16
    running = 2 * 4 * 2 * (heads * key * value + kernel * (2 * 2 * key + heads * value))  # two layers' bytes, two sequences
    assert (
        [size - running for _, size in sizes]
        == [4 * 2 * 2 * 2 * 16 * S for S in (6, 12)]
        == [s.cache - running for s, _ in sizes]
    )


def test_models_take_turns(layers):
    order = []

    def timer(name):
        return measuring.Variant(name, layers["16bit"]), lambda: order.append(name) or float(len(order))

    found = measuring.in_turn({name: timer(name) for name in "ab"}, 3, measuring.Silent())
    assert "".join(order) == "ab" * 4
    assert found["a"] == {"median": 5, "q1": 3, "q3": 7, "min": 3}, "the first round only warms up"


def test_limit_is_the_slower_of_moving_and_computing():
    must = {"experts": 60.0, "rest": 30.0, "cache": 10.0, "flops": 500.0, "used": 2.0}
    row = {"must": must, "ms": {"median": 50.0}, "graph_ms": None}
    (by_memory,) = measuring.with_limits([row], bandwidth=10e3, flop_rate=100e3)
    assert by_memory["limit_ms"] == 10 and by_memory["limited_by"] == "memory" and by_memory["share"] == 0.2
    (by_arithmetic,) = measuring.with_limits([row], bandwidth=1e6, flop_rate=20e3)
    assert by_arithmetic["limit_ms"] == 25 and by_arithmetic["limited_by"] == "arithmetic" and by_arithmetic["share"] == 0.5


def test_graphs_count_only_where_both_models_have_one():
    def row(model, ms, graph):
        return {"model": model, "phase": "decode", "batch": 1, "length": 8, "ms": {"median": ms}, "graph_ms": graph}

    graph = {"median": 1.0}
    one = [row("16bit", 4.0, None), row("compressed", 3.0, graph)]
    assert [found["ms"]["median"] for found in measuring.headline(one, "decode", ("compressed", "16bit"))] == [3, 4]
    both = [row("16bit", 4.0, {"median": 2.0}), row("compressed", 3.0, graph)]
    assert [found["ms"]["median"] for found in measuring.headline(both, "decode", ("compressed", "16bit"))] == [1, 2]
    assert measuring.headline([], "prefill", ("16bit", "16bit")) == (None, None)


def test_settings_are_all_combinations():
    config = {"prefill_batch": [4], "prefill_len": [512, 128], "decode_batch": [1, 4], "decode_len": [8], "repeats": 2}
    assert measuring.settings(config) == [("prefill", 4, 512), ("prefill", 4, 128), ("decode", 1, 8), ("decode", 4, 8)]
    assert measuring.rounds(config) == 12


def test_keys_take_a_number_or_a_list():
    found = values(["latency.prefill_batch=2", "latency.decode_batch=[1,8]"])["latency"]
    assert (found["prefill_batch"], found["decode_batch"]) == ([2], [1, 8])
    for wrong in ("0", "[]", "[1,0]", "x", "true"):
        with pytest.raises(ValueError, match=r"latency\.decode_batch.*between 1 and 1048576, or a list"):
            values([f"latency.decode_batch={wrong}"])
    one, same = (
        ("latency.prefill_batch=4", "latency.prefill_len=[512]"),
        ("latency.prefill_batch=[4]", "latency.prefill_len=512"),
    )
    assert len({dag.artefact("latency", resolve(lines)).key for lines in (one, same)}) == 1


def test_rates_of_the_device():
    assert 1e8 < device.bandwidth("cpu", 1 << 24) < 1e13
    assert 1e8 < device.flop_rate("cpu", torch.float32) < 1e15
    assert {"python", "torch", "transformers"} <= device.versions().keys()


@pytest.mark.parametrize(("skew", "tolerance"), [(0.0, 0.05), (0.6, 0.1), (1.2, 0.15)])
def test_skew_is_realised(layers, skew, tolerance):
    """One expert a token, so that none repeats: the frequencies are Zipf's. The table is what the experts are called with."""
    config = {**SHAPE, "num_experts_per_tok": 1}
    model = building.build(shapes.layers_only(config, 2, building.VOCAB), torch.float32, "cpu", None, SIZES)
    routing, ids = building.SkewedRouting(model, skew), tokens(8, 32)
    with torch.inference_mode(), traffic.selections(model) as counts:
        model(input_ids=ids, use_cache=True)
    np.testing.assert_array_equal(sum(counts).numpy(), routing.counts(ids).numpy())
    everything = routing.counts(torch.arange(building.VOCAB)).numpy()
    found = building.realised(everything)
    assert found["exponent"] == pytest.approx(skew, abs=tolerance) and found["unused"] == 0
    expected = np.arange(1, 9.0) ** -skew
    np.testing.assert_allclose(everything / everything.sum(), expected / expected.sum(), atol=0.02)


def test_no_token_takes_an_expert_twice(layers):
    for table_VK in building.SkewedRouting(layers["16bit"], 2.0).tables:
        assert (table_VK.sort().values.diff() > 0).all()


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("mixtral-8x7b", 46.7),
        ("mixtral-8x22b", 140.6),
        ("qwen1.5-moe", 14.3),
        ("deepseek-moe-16b", 16.4),
        ("phi-3.5-moe", 41.9),
        ("qwen3-30b-a3b", 30.5),
    ],
)
def test_shapes_have_the_published_number_of_weights(name, billions):
    shape = asking.read(name)
    dense = shape.get("first_k_dense_replace", 0)
    num_layers = shape["num_hidden_layers"] - dense
    assert num_layers == shapes.layers_in_all(shape)
    per_layer, two = (sum(p.numel() for p in outline(shape, n).parameters()) for n in (1, 2))
    weights = (two - per_layer) * num_layers + 2 * shape["vocab_size"] * shape["hidden_size"]
    weights += dense * (4 * shape["hidden_size"] ** 2 + 3 * shape["hidden_size"] * shape["intermediate_size"])
    assert weights / 1e9 == pytest.approx(billions, abs=0.06)


def outline(shape: dict, num_layers: int):
    return building.on_meta(shapes.layers_only(shape, num_layers, 16), torch.bfloat16)


def test_widths_have_the_mean_that_is_asked_for():
    shape = asking.read("qwen3-30b-a3b")
    mix = {"method": "pmq", "widths": [1, 2, 3], "bits": 2.5}
    assert shapes.widths(shape, mix, 128) == [3] * 64 + [2] * 64
    assert shapes.widths(shape, mix | {"bits": 2.0}, 128) == [2] * 128
    assert shapes.widths(shape, mix | {"bits": 3.0}, 128) == [3] * 128
    assert shapes.widths(shape, {"method": "uniform", "bits": 4.0}, 128) == [4] * 128


@pytest.fixture
def asked(tmp_path, monkeypatch) -> list[str]:
    """The command's arguments for the small shape."""
    monkeypatch.setattr(asking, "FOLDER", tmp_path)
    (tmp_path / "small.json").write_text(json.dumps(SHAPE))
    quick = ["latency.repeats=2", "latency.threads=1", "latency.buffer=1MiB", "quantization.group_size=16", "device=cpu"]
    settings = ["latency.prefill_batch=2", "latency.prefill_len=[16,8]", "latency.decode_batch=1", "latency.decode_len=8"]
    return ["latency", "latency.model=small", f"paths.results={tmp_path}/results", *quick, *settings]


def test_the_command_measures_once(asked, tmp_path, capsys, monkeypatch):
    asked.append("pruning=pesf")
    cli.run(asked)
    first = capsys.readouterr().out
    assert "2 of 5 layers" in first and "4 at 3 and 4 at 2 bits" in first and "x 2.5: extrapolated" in first
    (folder,) = (tmp_path / "results" / "latency").iterdir()
    found = json.loads((folder / "latency.json").read_text())
    assert json.loads((folder / "provenance.json").read_text())["stage"] == "latency"
    timed = {(row["phase"], row["length"]): [] for row in found["rows"]}
    for row in found["rows"]:
        timed[row["phase"], row["length"]].append(row["model"])
        assert row["share"] == row["limit_ms"] / row["ms"]["median"] and row["memory_is"] == "weights and cache"
    models = ["16bit", "compressed", "compressed-unpruned"]
    first_of_each = ["16bit", "16bit-eager", *models[1:]]
    assert timed == {("prefill", 16): first_of_each, ("prefill", 8): models, ("decode", 8): first_of_each}
    assert found["speedup_decode"] == found["decode_ms_16bit"]["median"] / found["decode_ms"]["median"]
    monkeypatch.setattr("moepress.stages.latency.run", None)
    cli.run(asked)
    assert capsys.readouterr().out == first
    cli.run(["show", folder.name[-12:], "--results", str(tmp_path / "results")])
    assert f"latency/{folder.name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["latency.model=big"], r"latency\.model=big: no such shape; it is one of small"),
        (["pruning=odp"], "pruning=odp: is fitted to real weights"),
        (["latency.num_layers=0"], r"latency\.num_layers=0: between 1"),
        (["latency.skew=-1"], r"latency\.skew=-1\.0: a Zipf exponent"),
        (["allocation.budget=1GiB"], r"give allocation\.bits"),
    ],
)
def test_what_cannot_be_timed_is_refused(asked, overrides, message):
    with pytest.raises(ValueError, match=message):
        cli.run([*asked, *overrides])


def test_layers_that_do_not_fit_are_refused(monkeypatch):
    config = shapes.layers_only(asking.read("mixtral-8x22b"), 3, building.VOCAB)
    monkeypatch.setattr(limits, "free_memory", lambda: 16 << 30)
    with pytest.raises(ValueError, match=r"latency\.num_layers=3: takes .* 1 layers fit, or latency\.dtype=bfloat16"):
        building.check_memory(config, torch.float32, "cpu")


def test_a_shape_is_no_experiment():
    with pytest.raises(ValueError, match=r"moepress latency latency\.model=mixtral-8x7b"):
        studies.experiment(["latency.model=mixtral-8x7b"])
    plain = dag.artefact("latency", resolve([])).key
    assert dag.artefact("latency", resolve(["latency.skew=2"])).key == plain, "read by shapes only"


def test_no_times_are_kept_under_another_machines_name(tmp_path):
    task = artefacts.Task("latency", "0" * 12, {"latency": {"hardware": "another"}}, {}, {"device": "cpu"}, tmp_path)
    with pytest.raises(ValueError, match=r"'another': this machine is '(.+)', .* give latency\.hardware='\1' \(auto is"):
        stage.run(task)
    assert not list(tmp_path.iterdir())
