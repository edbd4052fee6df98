"""The report over hand-made artefacts: values of the table, refusals, escaping, and the same bytes twice."""

import dataclasses
import hashlib
import json
import re
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace

import jinja2
import numpy as np
import pandas as pd
import pytest
import yaml
from docutils.core import publish_parts
from safetensors.numpy import save_file

from moepress import wording
from moepress.artefacts import Task
from moepress.report import (
    awareness,
    compare,
    costs,
    facts,
    figures,
    heatmaps,
    interactive,
    lines,
    paired,
    readable,
    reading,
    style,
    table,
)
from moepress.stages import report

ROOT = Path(__file__).parents[1]
DOMAINS = ("prose", "code", "elsewhere")
STUDY = (
    "16bit", "rtn-2", "rtn-3", "gptq-2", "gptq-3", "gptq-pmq-2", "gptq-pmq-2.5", "gptq-pmq-3", "qesc-2", "qesc-3",
    "qesc-pmq-2", "qesc-pmq-2.5", "qesc-pmq-3", "qesc-3-pesf-0.3", "qesc-3-pesf-0.7",
)  # fmt: skip


class Results:
    """A results folder of made-up artefacts of one model."""

    def __init__(self, root: Path, layers: int = 2, experts: int = 4, domains=DOMAINS, blocks: int = 5):
        self.root, self.layers, self.experts, self.domains, self.blocks = root, layers, experts, domains, blocks
        self.random = np.random.default_rng(0)
        self.text = self.random.uniform(3, 4, (len(domains), blocks))
        model = self.folder("model/tiny-aaaa")
        self.num_weights = 4096 * layers * experts
        names = [f"model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight" for i in range(layers) for e in range(experts)]
        save_file({name: np.zeros(4096, np.float16) for name in names}, model / "model.safetensors")
        config = {"model_type": "mixtral", "num_hidden_layers": layers, "hidden_size": 8, "intermediate_size": 16}
        self.write(model / "config.json", config | {"num_local_experts": experts, "num_experts_per_tok": 2})
        splits = {name: {"documents": 3, "characters": 1000} for name in ("train", "calibration", "test")}
        summary = {domain: dict(splits) for domain in domains}
        summary[domains[-1]] = {"test": splits["test"]}
        source = {"package": "some-text", "version": "1.0", "licence": "CC BY-SA 4.0", "sha256": "0"}
        overlap = {"words": 13, "test": {domain: {"dropped": 1, "mean_share_kept": 0.01} for domain in domains}}
        corpus = {"domains": summary, "sources": dict.fromkeys(domains, source), "overlap": overlap}
        self.write(self.folder("corpus/default-bbbb") / "summary.json", corpus)
        calibration = {"num_sequences": 8, "seq_len": 64, "domains": None, "seed": 0}
        self.config("calibration/8x64-cccc", {"calibration": calibration})
        self.use = self.random.dirichlet(np.full(experts, 3.0), (len(domains), layers))
        frequency = (2 * self.use.mean(0)).tolist()
        errors = [[4.0 + e, 2.0 + e, 1.0] for e in range(experts)]
        self.write(
            self.folder("statistics/tiny-dddd") / "statistics.json",
            {"widths": [1, 2, 3], "layers": [{"frequency": f, "mutual_information": 0.1, "errors": errors} for f in frequency]},
        )

    def folder(self, name: str) -> Path:
        path = self.root / name
        path.mkdir(parents=True, exist_ok=True)
        self.write(
            path / "provenance.json",
            {"stage": name.split("/")[0], "seconds": 2.0, "peak_memory_bytes": 2**30, "git_commit": "c0ffee"}
            | {"machine": {"system": "Linux"}, "versions": {"python": "3.11", "torch": "2.13.0"}},
        )
        if not (path / "config.yaml").is_file():
            self.write(path / "config.yaml", {"config": {}, "inputs": {}})
        return path

    def write(self, path: Path, value) -> None:
        path.write_text(json.dumps(value))

    def config(self, name: str, config: dict, inputs: dict | None = None) -> None:
        text = yaml.safe_dump({"config": config, "inputs": inputs or {}})
        (self.folder(name) / "config.yaml").write_text(text)

    def run(
        self,
        name: str,
        above: float | None = None,
        shift: float = 0.1,
        seed: int = 0,
        title: str | None = None,
        uneven: bool = False,
    ) -> dict:
        """The artefacts of one run, named like `qesc-pmq-2.5-pesf-0.3`; its nll is `above` the 16-bit model's, on other
        blocks more so if `uneven`."""
        found = re.fullmatch(r"([a-z0-9]+?)(?:-(pmq))?(?:-([\d.]+))?(?:-(pesf)-([\d.]+))?", name)
        method, allocation, bits, pruning, alpha = found.groups()
        method = "none" if method == "16bit" else method
        reference = method == "none" and not pruning
        key = f"{hashlib.sha256(f'{name} {seed}'.encode()).hexdigest()[:12]}"
        artefacts = {"corpus": "corpus/default-bbbb", "model": "model/tiny-aaaa"}
        above = 0.0 if reference else 0.3 / float(bits or 16) ** 2 if above is None else above
        self.evaluate(f"evaluation/{name}-{key}", above, None if reference else shift, 0.8 if pruning else 1.0, uneven)
        self.time(f"latency/{name}-{key}")
        artefacts |= {stage: f"{stage}/{name}-{key}" for stage in ("evaluation", "latency")}
        if method != "none":
            checkpoint = f"{method}-{allocation or 'uniform'}-{bits}"
            self.quantize(f"quantization/{checkpoint}", method, float(bits), allocation is not None)
            artefacts |= {stage: f"{stage}/{checkpoint}" for stage in ("quantization", "allocation")}
            if method != "rtn":
                artefacts["statistics"] = "statistics/tiny-dddd"
        if method != "none" and not pruning and bits == "2":
            artefacts["decomposition"] = f"decomposition/{name}-{key}"
            self.decompose(artefacts["decomposition"], above)
        if pruning:
            artefacts["pruning"] = f"pruning/{name}-{key}"
            self.folder(artefacts["pruning"])
        policy = {"method": "pesf", "alpha": float(alpha), "renormalize": True} if pruning else {"method": "none"}
        return {
            "run": title or name,
            "seed": seed,
            "is_reference": reference,
            "quantization": {"method": method, "group_size": 8, "attention_bits": 4},
            "allocation": {"method": allocation or "uniform", "bits": float(bits or 3), "budget": None},
            "pruning": policy,
            "artefacts": artefacts,
        }

    def evaluate(self, name: str, above: float, shift: float | None, active: float, uneven: bool) -> None:
        domains, frames = {}, []
        noise = 0.02 * above * np.linspace(-1, 1, self.blocks) * (-1 if uneven else 1)
        for index, domain in enumerate(self.domains):
            nll = self.text[index] + above * (1 + (index == len(self.domains) - 1)) + noise
            mean, error = nll.mean(), pd.Series(nll).sem()
            entry = {"ppl": np.exp(mean), "ppl_stderr": np.exp(mean) * error, "nll": mean, "num_blocks": self.blocks}
            entry |= {"num_tokens": 64 * self.blocks, "tokens_sha256": domain, "active_slots": active}
            entry |= {"expert_use": self.use[index].tolist(), "left_out": (1 - self.use[index]).tolist()}
            entry |= {"bits_per_byte": mean / 3, "scored_tokens": 63 * self.blocks}
            frame = pd.DataFrame({"domain": domain, "block": range(self.blocks), "nll": nll})
            if shift is not None:
                entry["selection_shift_by_layer"] = (shift * (0.5 + self.random.random(self.layers))).tolist()
                frame["selection_shift"] = shift
            domains[domain] = entry
            frames.append(frame)
        folder = self.folder(name)
        summary = {"loaded_bytes": 1000 if name.startswith("evaluation/16bit") else 500, "device": "cpu"}
        summary |= {"active_slots": active, "selection_shift": shift or 0.0, "selection_shift_stderr": 0.002}
        self.write(folder / "metrics.json", {"domains": domains, **summary})
        swap = {"metric": "acc,none", "value": 0.9 - above, "stderr": 0.02, "chance": 0.5, "num_items": 200, "limited": False}
        piqa = swap | {"value": 0.7 - above, "stderr": 0.04, "num_items": 100, "limited": True}
        scores = {"word_swap": swap | {"items_sha256": "1"}, "piqa": piqa | {"items_sha256": "2"}}
        frames_of_items = []
        for index, (task, score) in enumerate(scores.items()):
            usage = {"expert_use": self.use[index].tolist(), "left_out": (1 - self.use[index]).tolist(), "active_slots": active}
            score["usage"] = usage
            right = np.arange(score["num_items"]) < score["value"] * score["num_items"]
            items = {"group": task, "task": task, "item": range(len(right)), "score": right.astype(float)}
            frames_of_items.append(pd.DataFrame(items))
        pd.concat(frames_of_items).to_parquet(folder / "samples.parquet")
        self.write(folder / "tasks.json", {"moepress": {"limit": 100, "scores": scores}})
        pd.concat(frames).to_parquet(folder / "blocks.parquet")

    def decompose(self, name: str, above: float) -> None:
        """A third of the harm is the selections', half of it the weights'."""
        frames = [
            pd.DataFrame({"domain": d, "block": range(self.blocks), "16bit": self.text[i]}) for i, d in enumerate(self.domains)
        ]
        frame = pd.concat(frames)
        for part, share in (("shift_only", 1 / 3), ("weights_only", 1 / 2), ("both", 1)):
            frame[part] = frame["16bit"] + share * above
        frame.to_parquet(self.folder(name) / "blocks.parquet")
        overlap = {"topk_overlap": [0.9] * self.layers, "same_selection": [0.8] * self.layers}
        self.write(self.root / name / "decomposition.json", {"domains": dict.fromkeys(self.domains, overlap)})

    def time(self, name: str) -> None:
        def spread(median):
            return {"median": median, "q1": 0.95 * median, "q3": 1.1 * median, "min": 0.9 * median}

        is_reference = "/16bit-" in name and "pesf" not in name
        times = {"prefill_ms": spread(50.0), "decode_ms": spread(4.0)}
        times |= {"prefill_ms_16bit": spread(60.0), "decode_ms_16bit": spread(3.0)}
        speed = {"speedup_prefill": 1.2, "speedup_decode": 0.75, "share_prefill": 0.5, "share_decode": 0.25}
        machine = {"device": "Some CPU", "threads": 2, "dtype": "float32", "bandwidth": 2e10, "flop_rate": 1e11}
        machine |= {"versions": {"python": "3.11", "torch": "2.13.0"}, "measured": "16bit" if is_reference else "compressed"}
        must = {"experts": 60.0, "rest": 30.0, "cache": 10.0, "flops": 500.0, "used": 2.0, "bytes": 100.0}
        limits = {"must": must, "limit_ms": 2.0, "limited_by": "memory", "share": 0.5}
        limits |= {"memory_bytes": 600, "memory_is": "weights and cache", "experts": "packed", "graph_ms": None}
        rows = []
        for model in ("16bit", "16bit-eager") if is_reference else ("16bit", "16bit-eager", "compressed"):
            for phase, batch, length in (("prefill", 4, 512), ("prefill", 4, 128), ("decode", 1, 128), ("decode", 8, 128)):
                row = {"model": model, "phase": phase, "batch": batch, "length": length}
                if model != "16bit-eager" or (batch, length) in ((4, 512), (1, 128)):
                    rows.append(row | {"ms": spread(batch * length / 50)} | limits)
        self.write(self.folder(name) / "latency.json", machine | times | speed | {"rows": rows})

    def quantize(self, name: str, method: str, bits: float, mixed: bool) -> None:
        low = int(bits) - (bits == int(bits))
        row = [low if e % 2 else 2 * bits - low for e in range(self.experts)] if mixed else [bits] * self.experts
        widths = [[int(width) for width in np.roll(row, layer)] for layer in range(self.layers)]
        count = int(self.num_weights * (bits + 0.5) / 8)
        plan = {"bits": widths, "mean_bits": bits, "solver": [], "predicted_bytes": count + 1}
        plan |= {"predicted_folder_bytes": count + 90, "predicted_loaded_bytes": {"cpu": 502, "cuda": 400}}
        self.write(self.folder(name.replace("quantization", "allocation")) / "allocation.json", plan)
        inputs = {} if method == "rtn" else {"calibration": "calibration/8x64-cccc"}
        self.config(name, {"quantization": {"method": method}}, inputs)
        layers = []
        for layer in range(self.layers):
            fit = {"selection_shift_before_fit": 0.05 + 0.01 * layer, "selection_shift": 0.03 + 0.005 * layer}
            layers.append({"layer": layer, "bits": widths[layer]} | ({} if method == "rtn" else fit | {"starved": [0]}))
        folder = self.root / name
        self.write(folder / "diagnostics.json", {"layers": layers})
        measured = {"checkpoint_bytes": count, "folder_bytes": count + 100}
        self.write(folder / "size.json", measured | {"bits_effective": 8 * count / self.num_weights})
        self.write(folder / "timing.json", {"quantize_seconds": 1.5})

    def report(self, runs: list[dict], name: str = "study", caption: str = "A caption.") -> Path:
        out = self.root / "report" / f"{hashlib.sha256(name.encode()).hexdigest()[:8]}.partial"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        report.run(Task("report", "eeee", {"name": name, "caption": caption, "runs": runs}, {}, {}, out))
        return out


@pytest.fixture
def results(tmp_path) -> Results:
    return Results(tmp_path)


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> tuple[Results, list[dict], Path]:
    """A report over every kind of run."""
    made = Results(tmp_path_factory.mktemp("study"))
    runs = [made.run(name) for name in STUDY]
    return made, runs, made.report(runs)


def test_runs_without_timing(results):
    """latency.repeats=0: no artefact of the stage, no number in its columns, no figure of it."""
    runs = [results.run(name) for name in ("16bit", "gptq-2", "qesc-2")]
    for run in runs:
        del run["artefacts"]["latency"]
    out = results.report(runs)
    found = pd.read_csv(out / "runs.csv")
    assert found[["prefill_ms", "decode_ms", "speedup_prefill", "speedup_decode", "device"]].isna().all(axis=None)
    assert not (out / "figures" / "speed.csv").exists() and not (out / "figures" / "latency.csv").exists()
    summary = (out / "summary.md").read_text()
    assert "- Speed" not in summary and "nan" not in summary.lower()


def test_columns_and_values(study):
    made, _, out = study
    found = pd.read_csv(out / "runs.csv", keep_default_na=False, na_values=[""])
    assert list(found["run"]) == list(STUDY)
    expected = [
        "run",
        "model",
        "method",
        "allocation",
        "bits_nominal",
        "bits_effective",
        "checkpoint_bytes",
        "predicted_bytes",
        "folder_bytes",
        "predicted_folder_bytes",
        "loaded_bytes",
        "predicted_loaded_bytes",
        "pruning",
        "activated_experts",
        "remaining_experts",
        "protected_tokens",
    ]
    for domain in DOMAINS:
        expected += [f"ppl_{domain}", f"ppl_{domain}_stderr", f"bpb_{domain}"]
    for name in ("ppl_mean", "ppl_ood", "delta_nll", "delta_nll_ood", "selection_shift"):
        expected += [name, f"{name}_stderr"]
        if name == "delta_nll_ood":
            for part in ("shift_only", "weights_only"):
                expected += [f"delta_nll_{part}", f"delta_nll_{part}_stderr"]
            for task in ("word_swap", "piqa", "mean"):
                expected += [f"acc_{task}", f"acc_{task}_stderr"]
            expected += ["limit", "delta_acc", "delta_acc_stderr"]
    expected += [
        "quantize_seconds",
        "peak_memory_bytes",
        "prefill_ms",
        "decode_ms",
        "prefill_ms_16bit",
        "decode_ms_16bit",
        "speedup_prefill",
        "speedup_decode",
        "share_prefill",
        "share_decode",
        "inference_bytes",
    ]
    assert list(found.columns) == [*expected, "device", "timed_with", "seed", "keys"]

    sixteen, row = found.iloc[0], found.set_index("run").loc["qesc-pmq-2.5"]
    assert (sixteen["model"], sixteen["method"], sixteen["allocation"], sixteen["pruning"]) == ("tiny", *["none"] * 3)
    assert sixteen["bits_nominal"] == 16
    size = sum(path.stat().st_size for path in (made.root / "model/tiny-aaaa").glob("*.safetensors"))
    assert sixteen["checkpoint_bytes"] == size
    assert sixteen["bits_effective"] == pytest.approx(8 * size / made.num_weights)
    assert sixteen[["delta_nll", "delta_nll_stderr", "selection_shift"]].tolist() == [0, 0, 0]
    assert (row["method"], row["allocation"], row["bits_nominal"]) == ("qesc", "pmq", 2.5)
    off = [row[f"predicted_{name}"] - row[name] for name in ("folder_bytes", "loaded_bytes")]
    assert (row["predicted_bytes"] - row["checkpoint_bytes"], *off) == (1, -10, 2)
    assert sixteen["loaded_bytes"] == 1000 and sixteen[["predicted_bytes", "folder_bytes"]].isna().all()
    assert "loaded models within 0.40 %" in (out / "index.html").read_text()
    above = 0.3 / 2.5**2
    assert row["delta_nll"] == pytest.approx(above)
    assert row["delta_nll_ood"] == pytest.approx(2 * above)
    noise = pd.Series(0.02 * above * np.linspace(-1, 1, made.blocks)).sem()
    assert row["delta_nll_stderr"] == pytest.approx(noise / np.sqrt(2))  # two domains in, each with this error
    assert row["delta_nll_ood_stderr"] == pytest.approx(noise)
    assert row["ppl_mean"] == pytest.approx(np.sqrt(row["ppl_prose"] * row["ppl_code"]))
    assert row["ppl_mean"] / sixteen["ppl_mean"] == pytest.approx(np.exp(row["delta_nll"]))
    assert row["ppl_ood"] == pytest.approx(row["ppl_elsewhere"])
    assert (row["quantize_seconds"], row["peak_memory_bytes"], row["prefill_ms"]) == (1.5, 2**30, 50)
    assert (row["prefill_ms_16bit"], row["decode_ms_16bit"]) == (60, 3)
    assert (row["share_decode"], row["inference_bytes"]) == (0.25, 600)
    assert row["timed_with"] == "2 threads, float32, torch 2.13.0"
    pruned = found.set_index("run").loc["qesc-3-pesf-0.3"]
    assert (pruned["pruning"], pruned["activated_experts"]) == ("pesf-0.3", pytest.approx(1.6))
    assert row["acc_piqa"] == pytest.approx(0.7 - above) and row["acc_mean"] == pytest.approx(0.8 - above)
    assert row["acc_mean_stderr"] == pytest.approx(np.hypot(0.02, 0.04) / 2) and row["limit"] == 100
    keys = json.loads(row["keys"])
    assert keys["model"] == "aaaa" and set(keys) >= {
        "quantization",
        "allocation",
        "statistics",
        "evaluation",
        "latency",
    }


def test_the_parts_of_the_harm(study):
    """What the fixture made of it, in the table and under the figure; nothing where it was not asked for."""
    found = pd.read_csv(study[2] / "runs.csv").set_index("run")
    gptq = found.loc["gptq-2"]
    assert gptq["delta_nll_shift_only"] == pytest.approx(0.3 / 4 / 3)
    assert gptq["delta_nll_weights_only"] == pytest.approx(0.3 / 4 / 2)
    assert np.isnan(found.loc["16bit", "delta_nll_shift_only"]) and np.isnan(found.loc["gptq-3", "delta_nll_shift_only"])
    drawn = pd.read_csv(study[2] / "figures/decomposition.csv")
    both = drawn[(drawn["series"] == "GPTQ") & (drawn["part"] == "both")]
    assert both["delta_nll"].tolist() == pytest.approx([0.3 / 4] * 2) and len(both) == 2, "in and out of domain"
    assert set(drawn["topk_overlap"].dropna()) == {0.9}


def test_times_by_size_and_policy(study):
    """The 16-bit lines once, and of the others one for each size, mix and policy, over every setting."""
    drawn = pd.read_csv(study[2] / "figures/latency.csv")
    alone = ["2 bits", "3 bits", "2 bits, mixed", "2.5 bits, mixed", "3 bits, mixed", "3 bits + PESF 0.3", "3 bits + PESF 0.7"]
    assert drawn.groupby("name").size().to_dict() == dict.fromkeys(["16 bit", *alone], 4) | {"16 bit, plain experts": 2}
    decode = drawn[(drawn["name"] == "2 bits") & (drawn["phase"] == "decode")]
    assert decode["x"].tolist() == [1, 8] and decode["ms"].tolist() == [128 / 50, 8 * 128 / 50]
    assert set(drawn.loc[drawn["phase"] == "prefill", "x"]) == {4 * 512, 4 * 128} and (drawn["share"] == 0.5).all()


def test_sensitivity_of_experts(study):
    drawn = pd.read_csv(study[2] / "figures/sensitivity.csv")
    assert len(drawn) == 2 * 4 * 3
    assert drawn.loc[drawn["bits"] == 2, "relative"].mean() == pytest.approx(1)
    first = drawn[(drawn["layer"] == 1) & (drawn["expert"] == 2)].set_index("bits")["error"]
    assert first.to_dict() == {1: 6.0, 2: 4.0, 3: 1.0}


def test_every_figure_and_its_caption(study):
    out = study[2]
    names = sorted(path.stem for path in (out / "figures").glob("*.svg"))
    assert names == sorted(figures.FIGURES)
    for name in names:
        assert (out / f"figures/{name}.png").stat().st_size > 5000
        assert len(pd.read_csv(out / f"figures/{name}.csv"))
        ElementTree.parse(out / f"figures/{name}.svg")


def test_costs_count_every_artefact_once(study):
    _, runs, out = study
    spent = pd.read_csv(out / "costs.csv")
    wanted = {folder for run in runs for folder in run["artefacts"].values()} | {"calibration/8x64-cccc"}
    assert sorted(spent["artefact"]) == sorted(wanted), "what is shared, once"
    assert spent["stage"].drop_duplicates().tolist()[:2] == ["corpus", "model"] and spent["stage"].iloc[-1] == "latency"
    headings, rows = costs.table(spent)
    assert len({len(row) for row in (headings, *rows)}) == 1 and rows[-1][0] == ("all", f"{len(spent)} artefacts")
    assert rows[-1][1][0] == readable.seconds(2.0 * len(spent)) and rows[0][-1] == "1 GiB"
    page = (out / "index.html").read_text()
    assert all(f"<td>{stage}\n<small>" in page for stage in spent["stage"])


def test_costs_hold_what_no_run_names(results):
    """What an artefact was made from is found through it; what was deleted is passed over."""
    run = results.run("qesc-2")
    results.config("calibration/8x64-cccc", {}, {"corpus": "corpus/default-bbbb", "gone": "gradients/gone-ffff"})
    results.config(run["artefacts"]["quantization"], {}, {"calibration": "calibration/8x64-cccc"})
    slow = {"stage": "calibration", "seconds": 90.0, "cpu_seconds": {"startup": 1.0, "total": 45.0}, "peak_memory_bytes": 2**31}
    results.write(results.root / "calibration/8x64-cccc/provenance.json", slow)
    (own,) = reading.load([run], results.root)
    found = costs.by_stage(costs.tabulate([own]))
    assert found.loc["calibration"].tolist() == [1, 90.0, 45.0, 2**31] and "gradients" not in found.index
    assert np.isnan(found.loc["model", "cpu_seconds"]) and costs.table(costs.tabulate([own]))[1][-1][2] == "45.0 s"


def test_captions_for_snakemake(study):
    """One file says what every page, figure and table is; it is a Jinja template of reStructuredText."""
    template = jinja2.Environment().from_string((ROOT / "workflow/report/report.rst").read_text())
    texts, strict = {}, {"halt_level": 2}
    for name in ("index", "runs", "costs", *figures.FIGURES):
        wildcards = {"id": "default-0"} if name == "runs" else {"id": "default-0", "name": name}
        text = template.render(snakemake=SimpleNamespace(wildcards=wildcards))
        texts[name] = publish_parts(text, writer="html", settings_overrides=strict)["body"]
    assert len(set(texts.values())) == len(texts) and all(len(text) > 80 for text in texts.values())
    publish_parts((ROOT / "workflow/report/workflow.rst").read_text(), settings_overrides=strict)


def test_page_is_self_contained(study):
    page = without_bokeh((study[2] / "index.html").read_text())
    links = re.findall(r"(?:src|href)\s*=\s*([^>]{20})", page)
    assert len(links) == len(figures.FIGURES) and all(link.startswith('"data:image/svg+xml') for link in links)
    assert "url(" not in page and "http" not in re.sub(r"base64,[^\"]*", "", page)
    for text in ("CC BY-SA 4.0", "torch 2.13.0", "8 sequences of 64 tokens", "least used expert", "evaluation/16bit-"):
        assert text in page
    assert re.search(r"80\.0\s%\*", page) and re.search(r"70\.0\s%\s±\s4\.0\*", page), "limited scores are marked"
    assert re.search(r"90\.0\s%\s±\s2\.0<", page), "and others are not"
    markdown = (study[2] / "summary.md").read_text()
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(rows) == len(STUDY) + 2 and len({row.count("|") for row in rows}) == 1


def without_bokeh(page: str) -> str:
    """The page without the library's scripts, and no other ones in it than the data and the line that draws it."""
    for script in interactive.library():
        assert page.count(script) == 1
        page = page.replace(f"<script>{script}</script>", "")
    kinds = re.findall(r"<script([^>]*)>([^<]{0,30})", page)
    assert kinds == [(' type="application/json" id="live-data"', kinds[0][1]), ("", "Bokeh.embed.embed_items(...JSO")]
    return page


def test_same_bytes_twice(study):
    made, runs, _ = study
    runs = [run for run in runs if run["run"] in ("16bit", "rtn-2", "qesc-pmq-2.5")]
    out = made.report(runs, name="again")
    before = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    out = made.report(runs, name="again")
    assert before == {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_unequal_text_is_refused(results):
    runs = [results.run("16bit"), results.run("rtn-2"), results.run("gptq-2")]
    path = results.root / runs[2]["artefacts"]["evaluation"] / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["domains"]["code"]["tokens_sha256"] = "another"
    path.write_text(json.dumps(metrics))
    with pytest.raises(ValueError, match=r"'16bit' and 'gptq-2'.*different text of code"):
        results.report(runs)
    del metrics["domains"]["code"]
    path.write_text(json.dumps(metrics))
    with pytest.raises(ValueError, match=r"'16bit' and 'gptq-2'.*code"):
        results.report(runs)


def test_unequal_items_are_refused(results):
    runs = [results.run("16bit"), results.run("rtn-2")]
    path = results.root / runs[1]["artefacts"]["evaluation"] / "tasks.json"
    tasks = json.loads(path.read_text())
    tasks["moepress"]["scores"]["piqa"]["items_sha256"] = "others"
    path.write_text(json.dumps(tasks))
    with pytest.raises(
        ValueError, match=r"'16bit' and 'rtn-2' answered different items or prompts of piqa.*evaluation\.source"
    ):
        results.report(runs)
    path.unlink()  # a run without tasks stands beside the others
    found = pd.read_csv(results.report(runs) / "runs.csv")
    assert found["acc_mean"].notna().tolist() == [True, False]


def test_without_tasks(results):
    runs = [results.run("16bit"), results.run("rtn-2")]
    for run in runs:
        (results.root / run["artefacts"]["evaluation"] / "tasks.json").unlink()
    out = results.report(runs)
    assert not [column for column in pd.read_csv(out / "runs.csv").columns if column.startswith(("acc", "limit"))]
    page = (out / "index.html").read_text()
    assert not (out / "figures/accuracy.svg").exists() and "Scores by task" not in page and ">accuracy<" not in page


def test_scores_that_are_no_accuracies(results):
    run = results.run("16bit")
    score = {"metric": "word_perplexity,none", "value": 12.5, "stderr": None, "chance": 0.0, "num_items": 9, "limited": False}
    scores = {"wikitext": score | {"items_sha256": "1"}}
    path = results.root / run["artefacts"]["evaluation"] / "tasks.json"
    path.write_text(json.dumps({"moepress": {"limit": None, "scores": scores}}))
    out = results.report([run])
    row = pd.read_csv(out / "runs.csv").iloc[0]
    assert row["word_perplexity_wikitext"] == 12.5 and "acc_mean" not in row.index and np.isnan(row["limit"])
    assert readable.task_table(reading.load([run], results.root))[1] == [["16 bit", "12.50"]], "no percentage"


def test_missing_artefact_is_named(results):
    runs = [results.run("16bit"), results.run("rtn-2")]
    (results.root / runs[1]["artefacts"]["latency"] / "latency.json").unlink()
    with pytest.raises(ValueError, match=r"latency\.json.*'rtn-2'.*stage latency"):
        results.report(runs)


def test_hostile_names_stay_text(results):
    evil = '<script>alert(1)</script> $\\frac{ | " onload=x &amp;'
    runs = [results.run("16bit"), results.run("qesc-2", title=f"qesc-2 {evil}"), results.run("rtn-2")]
    out = results.report(runs, name=evil, caption=f"</p>{evil}")
    page = (out / "index.html").read_text()
    assert "<script>alert" not in without_bokeh(page) and page.count("&lt;script&gt;") > 3
    assert list(pd.read_csv(out / "runs.csv")["run"])[1] == f"qesc-2 {evil}"
    for svg in (out / "figures").glob("*.svg"):
        ElementTree.parse(svg)
        assert "<script" not in svg.read_text()


@pytest.mark.parametrize("names", [["16bit"], ["16bit", "gptq-pmq-2.5"], ["16bit", "16bit-pesf-0.3"], ["rtn-3"]])
def test_few_runs(results, names):
    out = results.report([results.run(name) for name in names])
    assert len(pd.read_csv(out / "runs.csv")) == len(names)
    assert (out / "figures/expert_use.png").is_file()
    assert (out / "figures/bits.png").is_file() == ("gptq-pmq-2.5" in names)
    assert (out / "figures/pruning.png").is_file() == ("16bit-pesf-0.3" in names)
    assert (out / "index.html").is_file()


def test_best_is_best_only_outside_noise(results):
    runs = [
        results.run("16bit"),
        results.run("rtn-2", 0.2),
        results.run("gptq-2", 0.1),
        results.run("qesc-2", 0.1001, uneven=True),
    ]
    found = reading.load(runs, results.root)
    assert compare.marks(found) == {"16bit": "", "rtn-2": "", "gptq-2": "best", "qesc-2": "tied"}
    ranking = compare.places(found)["2 bits"]
    assert [place.series for place in ranking] == ["GPTQ", "QESC", "RTN"]
    assert ranking[2].gap[0] == pytest.approx(0.1)
    text = " ".join(compare.summary(found))
    assert "GPTQ has the lowest perplexity" in text and "not to be told from QESC: within the noise" in text
    assert "RTN is behind by 10.5" in text


def resize(made: Results, run: dict, factor: float) -> None:
    path = made.root / run["artefacts"]["quantization"] / "size.json"
    size = json.loads(path.read_text())
    made.write(path, size | {"checkpoint_bytes": round(size["checkpoint_bytes"] * factor)})


def test_only_what_takes_the_same_bytes_is_ranked(results):
    runs = [results.run("16bit"), results.run("rtn-2", 0.2), results.run("gptq-2", 0.1), results.run("qesc-2", 0.15)]
    resize(results, runs[3], 1.005)
    found = reading.load(runs, results.root)
    assert list(compare.places(found)) == ["2 bits"] and compare.marks(found)["gptq-2"] == "best", "within a percent"
    resize(results, runs[2], 1.04)
    found = reading.load(runs, results.root)
    large, small = compare.places(found).items()
    assert large[0] == "2 bits, 10.4 KiB" and [place.series for place in large[1]] == ["GPTQ"]
    assert small[0] == "2 bits, 10 KiB" and [place.series for place in small[1]] == ["QESC", "RTN"]
    assert compare.marks(found) == {"16bit": "", "rtn-2": "", "gptq-2": "", "qesc-2": "best"}
    text = " ".join(compare.summary(found))
    assert "At 2 bits (10.4 KiB, " in text and "GPTQ changes perplexity by" in text and "QESC is best" in text
    assert "At 2 bits the checkpoints take 10.4 KiB and 10 KiB: methods are ranked within one" in text
    resize(results, runs[3], 0.97)
    found = reading.load(runs, results.root)
    rows = table.tabulate(found)
    assert not any(compare.marks(found).values())
    assert "★" not in readable.markdown("a", "b", [], readable.groups(found, rows)), "nor is the mark explained"


def test_speeds_name_both_times(results):
    """Of one process, with what their scatter says; the 16-bit run's own time comes from another."""
    runs = [results.run("16bit"), results.run("rtn-2"), results.run("gptq-2")]
    found = reading.load(runs, results.root)
    own = found[1].speedup("prefill")
    assert (
        own[:3] == pytest.approx((1.2, 0.95 * 60 / 55, 66 / 47.5)) and not own.is_noise and found[0].speedup("decode") is None
    )
    sentence = compare.summary(found)[-1]
    assert sentence.startswith("Speed against 16 bits on Some CPU")
    assert sentence.endswith("prefill 1.20× (1.04 to 1.39), decode 0.75× (0.65 to 0.87).")
    groups = readable.groups(found, table.tabulate(found))
    cells = {row.cells["method"][1]: row.cells for group in groups for row in group.rows}
    assert cells["16bit"]["prefill"] == ("1", "50 ms")
    assert (cells["rtn-2"]["prefill"], cells["rtn-2"]["decode"]) == (("1.20×", "50 for 60 ms"), ("0.75×", "4 for 3 ms"))

    path = results.root / runs[1]["artefacts"]["latency"] / "latency.json"
    latency = json.loads(path.read_text())
    latency["prefill_ms"] = {"median": 40.0, "q1": 30.0, "q3": 70.0, "min": 20.0}
    results.write(path, latency | {"speedup_prefill": 1.5})
    found = reading.load(runs, results.root)
    assert "prefill between 1.20× (1.04 to 1.39) and 1.50× (0.81 to 2.20), 1 of 2 within noise, decode 0.75×" in " ".join(
        compare.summary(found)
    )
    assert "prefill 1.50× (0.81 to 2.20, within noise), decode" in compare.summary(found[:2])[-1]
    figure, drawn = lines.speed(found)
    style.plt.close(figure)
    assert drawn.loc[0, ["speedup", "low", "high"]].tolist() == pytest.approx([1.5, 57 / 70, 2.2])

    alone = dict.fromkeys(("prefill_ms_16bit", "decode_ms_16bit", "speedup_prefill", "speedup_decode"))  # 16 bit does not fit
    results.write(path, latency | alone)
    found = reading.load(runs[:2], results.root)
    assert "Speed" not in " ".join(compare.summary(found)) and found[1].speedup("prefill") is None
    groups = readable.groups(found, table.tabulate(found))
    assert groups[-1].rows[0].cells["prefill"] == ("", "40 ms")


def test_what_is_the_same_in_all_rows_is_said_once(study):
    page, summary = (study[2] / "index.html").read_text(), (study[2] / "summary.md").read_text()
    assert '<th scope="col">quantized in</th>' not in page and '<th scope="col">bits</th>' in page
    assert "The same in all rows that have it: quantized in 1.5 s. " in page
    assert "quantized in" in summary.split("| ---")[0], "a terminal has all columns"


@pytest.mark.parametrize(
    ("value", "places", "expected"), [(-0.04, 1, "0.0"), (0.04, 1, "0.0"), (-0.06, 1, "-0.1"), (2, 1, "+2.0"), (0.0, 2, "0.00")]
)
def test_zero_has_no_sign(value, places, expected):
    assert wording.decimal(value, places) == expected
    assert wording.decimal(value, places, sign=False) == expected.lstrip("+")


def test_scatter_between_seeds_is_noise(results):
    runs = [results.run("16bit")]
    for seed, (gptq, qesc) in enumerate([(0.10, 0.14), (0.20, 0.11), (0.15, 0.20)]):
        runs += [results.run("gptq-2", gptq, seed=seed, title=f"gptq-2 seed={seed}")]
        runs += [results.run("qesc-2", qesc, seed=seed, title=f"qesc-2 seed={seed}")]
    found = reading.load(runs, results.root)
    ranking = compare.places(found)["2 bits"]
    assert [len(place.runs) for place in ranking] == [3, 3] and ranking[1].is_tied
    delta = ranking[0].delta
    assert delta.value == pytest.approx(0.15) and delta.stderr > np.std([0.1, 0.2, 0.15], ddof=1) / np.sqrt(3)


def test_a_recipe_of_our_own_is_no_twin_of_gptq(results):
    """It calibrates routers too, but the sentence on QESC's purpose compares equal settings only."""
    runs = [results.run("16bit"), results.run("gptq-2", shift=0.2), results.run("qesc-2", shift=0.1)]
    ours = results.run("qesc-2", 0.01, shift=0.01, seed=1, title="fast-2")
    ours["quantization"]["name"] = "fast"
    found = reading.load([*runs, ours], results.root)
    assert found[-1].title == "ours, fast, 2 bits"
    (sentence,) = [one for one in compare.summary(found) if one.startswith("Calibrating the router")]
    assert "in 1 of 1 comparisons" in sentence and "10.0 % of the slots change with QESC" in sentence


def test_a_row_is_the_mean_over_seeds(results):
    runs = [results.run("16bit")]
    above = {"rtn-2": [0.4], "gptq-2": [0.10, 0.20, 0.15], "gptq-2-pesf-0.3": [0.3, 0.35, 0.25]}
    for name, values in above.items():
        runs += [results.run(name, one, seed=s, title=f"{name} seed={s}", shift=0.1 + s / 10) for s, one in enumerate(values)]
    out = results.report(runs)
    page, table = (out / "index.html").read_text(), pd.read_csv(out / "runs.csv")
    assert len(table) == 8 and page.count("<small>3 seeds</small>") == 2
    found = reading.load(runs, results.root)
    rows = {row.cells["method"]: row.cells for group in readable.groups(found, table) for row in group.rows}
    gptq = rows["GPTQ", "3 seeds"]
    assert float(gptq["perplexity"][0]) == pytest.approx(np.exp(np.log(table["ppl_mean"][2:5]).mean()), rel=1e-3)
    assert gptq["perplexity"][1].startswith("+16") and gptq["changed selections"][0].startswith("20")
    assert "3 seeds" not in str(rows["RTN", "rtn-2 seed=0"])
    _, by_task = readable.task_table(found)
    assert [row[0] for row in by_task] == ["16 bit", "RTN, 2 bits", "GPTQ, 2 bits", "GPTQ + PESF 0.3, 2 bits"]
    assert by_task[2][1].startswith(f"{100 * (0.9 - 0.15):.1f}")
    (sentence,) = [one for one in compare.summary(found) if one.startswith("PESF 0.3 on GPTQ")]
    assert "+16" in sentence
    pairs = {(pair.runs[0].title, pair.against): pair for pair in paired.pairs(found)}
    assert len(pairs["GPTQ, 2 bits", "RTN"].runs) == 3 and len(pairs["GPTQ, 2 bits", "RTN"].others) == 1


def test_a_difference_between_several_seeds_names_both_noises(results):
    runs = [results.run("16bit"), results.run("gptq-2", 0.1), results.run("rtn-2", 0.2)]
    text = " ".join(compare.summary(reading.load(runs, results.root)))
    assert "more than the noise of the test text." in text
    runs += [results.run("gptq-2", 0.1, seed=1, title="gptq-2 seed=1"), results.run("qesc-2", 0.1001, uneven=True)]
    text = " ".join(compare.summary(reading.load(runs, results.root)))
    assert "from QESC: within the noise of the test text and of the calibration samples; RTN" in text
    assert "more than the noise of the test text and of the calibration samples." in text


def test_keys_of_two_groups_are_two_methods(results):
    titles = [f"gptq-2 {group}.num_sequences=32" for group in ("calibration", "gradients")]
    found = reading.load([results.run("gptq-2", seed=s, title=title) for s, title in enumerate(titles)], results.root)
    assert [run.series for run in found] == ["GPTQ num_sequences=32", "GPTQ gradients.num_sequences=32"]
    assert len(reading.methods(found)) == 2
    keys = []
    for group in ("quantization", "allocation", "calibration"):
        options = [yaml.safe_load(path.read_text()) for path in (ROOT / "conf" / group).glob("*.yaml")]
        keys += {key for option in options for key in option} - {"defaults", "method", "seed"}
    assert len(set(keys)) == len(keys), "these three need no group"


def test_every_sample_of_a_pruned_model_is_drawn_with_what_it_prunes(results):
    """The 16-bit model is there once, a quantized one once for each sample."""
    runs = [results.run("16bit")]
    for seed in range(3):
        runs.append(results.run("16bit-pesf-0.3", seed=seed, title=f"16bit-pesf-0.3 calibration.seq_len=64 seed={seed}"))
        runs += [results.run(name, seed=seed, title=f"{name} seed={seed}") for name in ("qesc-3", "qesc-3-pesf-0.3")]
    found = reading.load(runs, results.root)
    assert reading.base_of(found[1], found) is found[0] and reading.base_of(found[6], found) is found[5]
    figure, data = lines.pruning(found)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    style.plt.close(figure)
    inside = data[data["text"].str.contains("corpus")]
    assert inside.groupby(["checkpoint", "sample"])["pruning"].agg(list).map(tuple).to_dict() == {
        (title, sample): ("none", "PESF 0.3") for title in ("16 bit", "QESC, 3 bits") for sample in range(3)
    }
    assert labels == ["16 bit", "QESC, 3 bits"], "each once"
    assert "PESF 0.3 on 16 bit computes" in " ".join(compare.summary(found))


def test_a_line_is_named_at_the_mean_of_its_seeds(results):
    runs = [results.run("16bit")]
    runs += [results.run("gptq-2", above, seed=seed, title=f"gptq-2 seed={seed}") for seed, above in enumerate((0.1, 0.2, 0.6))]
    figure, data = lines.quality(reading.load(runs, results.root))
    (name,) = [text for text in figure.axes[0].texts if text.get_text() == "GPTQ"]
    style.plt.close(figure)
    own = data[(data["series"] == "GPTQ") & data["text"].str.contains("corpus")]
    assert name.xy[1] == pytest.approx(np.exp(np.log(own["ppl"]).mean()))


def test_our_own_recipe_is_called_by_its_name(results):
    runs = [results.run("16bit"), results.run("qesc-pmq-2.5")]
    runs[1]["quantization"]["name"] = "best"
    figure, data = heatmaps.bits(reading.load(runs, results.root))
    style.plt.close(figure)
    assert set(data["allocation"]) == {"PMQ, 2.5 bits (ours, best)"}


def test_only_static_removal_takes_experts_away_for_good(results):
    runs = [results.run("16bit"), results.run("qesc-3-pesf-0.3"), results.run("qesc-3-pesf-0.7")]
    runs[1]["pruning"] = {"method": "drop", "ratio": 0.5, "renormalize": True}
    runs[2]["pruning"] = {"method": "static", "criterion": "reap", "ratio": 0.5}
    assert [run.remaining_experts for run in reading.load(runs, results.root)] == [4, 4, 2]


def test_layers_have_the_models_numbers(results):
    (run,) = reading.load([results.run("16bit")], results.root)
    vars(run)["shape"] = dataclasses.replace(run.shape, moe_layers=(3, 5))
    layer = np.unravel_index(results.use[:2].mean(0).argmin(), (2, results.experts))[0]
    assert f"(layer {(3, 5)[layer]}, expert" in facts.model([run])["least used expert"]


def test_a_single_domain_tells_no_information(tmp_path):
    made = Results(tmp_path, domains=("prose", "elsewhere"))
    (run,) = reading.load([made.run("16bit")], tmp_path)
    figure, _ = heatmaps.expert_use([run])
    titles = [axis.get_title() for axis in figure.axes]
    style.plt.close(figure)
    assert "layer 0" in titles and not any("bit" in title for title in titles)


def test_a_type_that_is_not_known_is_not_told(results):
    run = results.run("gptq-2")
    path = results.root / run["artefacts"]["latency"] / "latency.json"
    results.write(path, json.loads(path.read_text()) | {"dtype": None})
    assert facts.machine(reading.load([run], results.root))["timed on"] == "Some CPU, 2 threads"


def test_many_series_of_one_method_all_look_different(results):
    runs = [results.run("gptq-2", title=f"gptq-2 quantization.damping={number}") for number in range(30)]
    styles = style.series_styles(reading.load(runs, results.root))
    assert len({(look["color"], look["marker"], str(look["linestyle"])) for look in styles.values()}) == 30


def test_one_block_has_no_error(tmp_path):
    made = Results(tmp_path, blocks=1)
    found = reading.load([made.run("16bit"), made.run("rtn-2"), made.run("gptq-2")], tmp_path)
    rows = table.tabulate(found)
    assert rows["delta_nll_stderr"].isna().all()
    text = readable.markdown("one", "block", compare.summary(found), readable.groups(found, rows))
    assert "too few blocks" in text and not re.search(r"\bnan\b", text)


def test_large_model_and_unknown_methods(tmp_path):
    made = Results(tmp_path, layers=40, experts=128, domains=("wikitext", "c4"))
    found = reading.load([made.run(name) for name in ("16bit", "hqq-2", "hqq-pmq-2.5")], tmp_path)
    for draw, rows in ((heatmaps.bits, 40 * 128), (heatmaps.expert_use, 2 * 40 * 128), (lines.quality, 6)):
        figure, data = draw(found)
        assert len(data) == rows and max(figure.get_size_inches()) < 40
        style.plt.close(figure)
    assert {place.series for place in compare.places(found)["2.5 bits"]} == {"HQQ + PMQ"}


def test_overrides_in_a_name_make_a_series(results):
    runs = [results.run("16bit"), results.run("gptq-2", title="gptq-2 quantization.group_size=64 seed=1")]
    runs += [results.run("gptq-2"), results.run("gptq-3")]
    found = reading.load(runs, results.root)
    assert [run.series for run in found] == ["16 bit", "GPTQ group_size=64", "GPTQ", "GPTQ"]
    styles = style.series_styles(found)
    assert styles["GPTQ"]["color"] == style.METHOD_COLOURS["gptq"] != styles["GPTQ group_size=64"]["color"]


@pytest.mark.parametrize(
    ("found", "told"), [(0.02, None), (0.005, r"gptq-2 had a first rate of 0\.005, for 0\.02"), (None, "gptq-2 goes without")]
)
def test_a_last_tuning_that_went_otherwise_than_asked_for_is_told(results, found, told):
    runs = [results.run("16bit"), results.run("gptq-2"), results.run("gptq-3")]
    runs[1]["quantization"]["distill_rate"] = 0.02
    path = results.root / "quantization/gptq-uniform-2/diagnostics.json"
    results.write(path, json.loads(path.read_text()) | {"distill_rate": found})
    said = facts.methods(reading.load(runs, results.root)).get("last tuning")
    assert re.match(told, said) if told else said is None


def test_report_imports_no_torch():
    import subprocess

    code = "import sys; import moepress.stages.report; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_how_alike_texts_use_experts():
    use = np.random.default_rng(0).dirichlet(np.ones(4), (3, 2))
    alike, cosine = awareness.overlap(use), awareness.cosine(use)
    for a in range(3):
        for b in range(3):
            shared = [sum(min(use[a, layer, e], use[b, layer, e]) for e in range(4)) for layer in range(2)]
            angle = [use[a, k] @ use[b, k] / np.linalg.norm(use[a, k]) / np.linalg.norm(use[b, k]) for k in range(2)]
            assert alike[a, b] == pytest.approx(np.mean(shared)) and cosine[a, b] == pytest.approx(np.mean(angle))
    assert awareness.overlap(np.eye(2)[:, None]).tolist() == [[1, 0], [0, 1]]


def test_figures_of_task_awareness_show_domains_and_tasks(study):
    made, _, out = study
    similar = pd.read_csv(out / "figures/similarity.csv")
    names = [*DOMAINS, "word_swap", "piqa"]
    assert list(dict.fromkeys(similar["text"])) == names and len(similar) == len(names) ** 2
    assert (similar.loc[similar["text"] == similar["other"], "overlap"] == 1).all()
    left_out = pd.read_csv(out / "figures/left_out.csv")
    row = left_out[(left_out["text"] == "word_swap") & (left_out["layer"] == 1) & (left_out["expert"] == 2)].iloc[0]
    assert row["left_out"] == pytest.approx(1 - made.use[0, 1, 2]) and row["active_slots"] == 0.8
    assert set(left_out["run"]) == {name for name in STUDY if "pesf" in name}


def test_pruned_runs_may_have_answered_different_tasks(results):
    runs = [results.run(name) for name in ("16bit-pesf-0.3", "qesc-3-pesf-0.3")]
    for run, own in zip(runs, ("piqa", "word_swap"), strict=True):
        path = results.root / run["artefacts"]["evaluation"] / "tasks.json"
        tasks = json.loads(path.read_text())
        tasks["moepress"]["scores"] = {own: tasks["moepress"]["scores"][own]}
        results.write(path, tasks)
    figure, data = awareness.left_out(reading.load(runs, results.root))
    style.plt.close(figure)
    assert data.groupby("run")["text"].unique().map(list).to_dict() == {
        "16bit-pesf-0.3": [*DOMAINS, "piqa"],
        "qesc-3-pesf-0.3": [*DOMAINS, "word_swap"],
    }
