"""The model card of a packed checkpoint: README.md in Markdown with the hub's front matter, from facts alone."""

import html
import math
import re
from collections.abc import Iterable
from itertools import groupby

import jinja2
import yaml

from moepress.dag import distill_sequences
from moepress.models.families import group_of
from moepress.report.run import label
from moepress.wording import rounded_bytes

CARD = """\
# {{ name }} in {{ nominal }} bits

{{ base }} compressed by moepress{% if methods %}: {{ methods }}{% endif %}. Every quantized weight occupies its bits in these
files: {{ size }} instead of {{ size16 }} at 16 bits, everything counted.

| | |
|---|---|
| base model | {{ base }} |
| architecture | {{ shape.family }}, {{ shape.num_layers }} layers, {{ shape.num_experts }} experts in a layer, \
{{ shape.top_k }} for each token |
| weights | {{ weights }} |
| weight files | {{ size }} |
| bits of an expert's weight, on average | {{ nominal }} |
| bits a weight takes on disk, all included | {{ effective }} |
| group size | {{ groups }} |
| attention | {{ attention }} |
| at 16 bits | {{ sixteen }} |

## How to load it

```python
import moepress  # registers the format with transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its name on the hub
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
print(tokenizer.decode(model.generate(**tokenizer("Once", return_tensors="pt"), max_new_tokens=20)[0]))
```

Every file is compared with its hash before anything is loaded. `moepress.load(folder)` does so too and picks device and dtype.

## Bits

How many experts of each layer have which width.

| layer |{% for width in widths %} {{ width }} |{% endfor +%}
|---|{% for _ in widths %}---|{% endfor +%}
{% for layers, counts in rows %}
| {{ layers }} |{% for count in counts %} {{ count }} |{% endfor +%}
{% endfor %}

## Results
{% if results %}

Perplexity on test text that the calibration never saw, ± one standard error over blocks of text.

| text | 16 bits | this model |
|---|---|---|
{% for row in results.domains %}
| {{ row.domain }} | {{ row.ppl16 }} | {{ row.ppl }} |
{% endfor %}
{% if results.tasks %}

Share of right answers in percent, ± one standard error over the items{{ results.limited }}.

| task | 16 bits | this model |
|---|---|---|
{% for row in results.tasks %}
| {{ row.task }} | {{ row.acc16 }} | {{ row.acc }} |
{% endfor %}
{% endif %}

| | |
|---|---|
{% for term, value in results.rest %}
| {{ term }} | {{ value }} |
{% endfor %}
{% else %}

Not measured yet.
{% endif %}

## How it was made

{{ calibration }}

{{ command }}
{% if not_told %}

What was chosen for {{ not_told }} is not recorded.
{% endif %}

Checkpoint key `{{ key }}`{% if commit %}, commit `{{ commit }}`{% endif %}. Versions: {{ versions }}.
"""
TAGS = ["moepress", "mixture-of-experts", "quantized"]


class Markdown(str):
    """Text that is Markdown already; everything else is escaped."""


def escape(text: str) -> Markdown:
    """Text that Markdown, inside tables too, and HTML show as it is."""
    plain = html.escape(" ".join(str(text).split()), quote=False)
    return Markdown(re.sub(r"([\\`*_\[\]|~#!$])", r"\\\1", plain))


def fenced(text: str) -> Markdown:
    """A block of shell code that its content cannot close."""
    line = " ".join(str(text).split())
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", line))])
    return Markdown(f"{fence}bash\n{line}\n{fence}")


def render(facts: dict, results: dict | None = None) -> str:
    """The card's whole text.

    facts: as `moepress.report.made.facts` gives them. results: what was measured, `{domains: [{domain, ppl, ppl_stderr,
    ppl16, ppl16_stderr}], tasks: [{task, acc, acc_stderr, acc16, acc16_stderr}], selection_shift,
    selection_shift_stderr, ...}` as `moepress.export.measured` gives it; None where
    nothing was.
    """
    front = {"base_model": facts["base_model"], **facts["licence"], "library_name": "transformers", "tags": TAGS}
    front |= {"pipeline_tag": "text-generation", "base_model_relation": "quantized"}
    environment = jinja2.Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        finalize=lambda value: value if isinstance(value, (Markdown, int)) else escape(value),
    )
    text = environment.from_string(CARD).render(**_values(facts), results=_measured(results, facts) if results else None)
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n{text}"


def _values(facts: dict) -> dict:
    quantization, allocation = facts["quantization"], facts["allocation"]
    attention = quantization.get("attention_bits")
    widths = sorted({width for layer in facts["bits"] for width in layer})
    methods = [label(facts.get("preset", quantization["method"]))]
    methods += [label(allocation["method"])] if allocation["method"] != "uniform" else []
    return {
        "name": facts["base_model"].rpartition("/")[2],
        "base": facts["base_model"],
        "methods": " + ".join(methods),
        "nominal": f"{facts['bits_nominal']:.4g}",
        "effective": f"{facts['bits_effective']:.3f}",
        "size": rounded_bytes(facts["checkpoint_bytes"]),
        "size16": rounded_bytes(2 * facts["weights"]),
        "weights": f"{facts['weights']:,}",
        "shape": facts["shape"],
        "groups": groups(facts["shape"], quantization["group_size"]),
        "attention": f"{attention} bits" if attention else "16 bits",
        "sixteen": "router, norms, embedding, head" + ("" if attention else ", attention"),
        "widths": [f"{width} bit{'s' if width > 1 else ''}" for width in widths],
        "rows": bit_rows(facts["bits"], widths, facts.get("layers", range(len(facts["bits"])))),
        "calibration": calibration(facts["calibration"], quantization),
        "command": fenced(facts["command"]),
        "not_told": ", ".join(facts["not_told"]),
        "key": Markdown(re.sub(r"\W", "", facts["key"])),
        "commit": Markdown(re.sub(r"[^\w+]", "", facts["git_commit"] or "")),
        "versions": ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
    }


def groups(shape: dict, group_size: int) -> str:
    """How many of an expert's weights share a scale, where the group size does not divide its rows too."""
    gate_up, down = (group_of(shape[name], group_size) for name in ("hidden_size", "intermediate_size"))
    if gate_up == down == group_size:
        return f"{group_size} weights share a scale and a zero point"
    each = f"{gate_up} weights" if gate_up == down else f"{gate_up} weights, of an expert's down projection {down},"
    return f"{each} share a scale and a zero point: {group_size} does not divide all rows"


def bit_rows(bits: list[list[int]], widths: list[int], layers: Iterable[int]) -> list[tuple[str, list[int]]]:
    """`(layers, experts at each of the widths)`, neighbours that are alike in one row: `("0-2", [0, 6, 2])`. layers: the
    numbers of those that have experts."""
    found = []
    numbered = zip(layers, bits, strict=True)
    for counts, members in groupby(numbered, key=lambda item: [item[1].count(width) for width in widths]):
        alike = [layer for layer, _ in members]
        found.append((f"{alike[0]}" if len(alike) == 1 else f"{alike[0]}-{alike[-1]}", counts))
    return found


def calibration(config: dict | None, quantization: dict) -> str:
    if not config:
        return "Without calibration text. The command:"
    sequences, length = config["num_sequences"], config["seq_len"]
    domains = ", ".join(config["domains"]) if config["domains"] else "all domains of its corpus"
    most = distill_sequences({"calibration": config, "quantization": quantization})
    tuned = f"; then tuned as a whole on up to {most} such sequences" if most else ""
    return (
        f"Calibrated on {sequences * length:,} tokens ({sequences} sequences of {length}) from {domains}, "
        f"drawn with seed {config['seed']}{tuned}. The command:"
    )


def _measured(results: dict, facts: dict) -> dict:
    """The results in words, as the template takes them; what was not measured is left out."""
    domains = [
        {
            "domain": row["domain"],
            "ppl16": _with_error(row["ppl16"], row["ppl16_stderr"]),
            "ppl": _with_error(row["ppl"], row["ppl_stderr"]),
        }
        for row in results["domains"]
    ]
    shift = _with_error(100 * results["selection_shift"], 100 * results["selection_shift_stderr"])
    rest = [
        ("selected experts that changed", f"{shift} %"),
        ("weight files", f"{rounded_bytes(facts['checkpoint_bytes'])}, the 16-bit model's {rounded_bytes(results['bytes16'])}"),
    ]
    if results.get("delta_nll") is not None:
        ratio = math.exp(results["delta_nll"])
        change = _with_error(100 * (ratio - 1), 100 * ratio * (results.get("delta_nll_stderr") or 0))
        rest.insert(0, ("change of perplexity, mean over the corpus's texts, paired block by block", f"{change} %"))
    if results.get("delta_acc") is not None:
        change = _with_error(100 * results["delta_acc"], 100 * (results.get("delta_acc_stderr") or 0))
        rest.append(("change of accuracy, mean over the tasks, paired item by item", f"{change} points"))
    for phase in ("prefill", "decode"):
        times, speed = results.get(f"{phase}_ms"), results.get(f"speedup_{phase}")
        if times is not None and speed is not None:
            rest.append((phase, f"{speed:.2f} times as fast as at 16 bits, {times:.3g} ms, on {results['device']}"))
    tasks = [{"task": row["task"]} | {name: _share(row, name) for name in ("acc", "acc16")} for row in results.get("tasks", ())]
    limited = f"; only the first {results['limit']:.0f} of each were asked" if results.get("limit") else ""
    return {"domains": domains, "rest": rest, "tasks": tasks, "limited": limited}


def _share(row: dict, name: str) -> str:
    return "" if row[name] is None else _with_error(100 * row[name], 100 * (row[f"{name}_stderr"] or 0))


def _with_error(value: float, error: float) -> str:
    """The value to the second digit of its error."""
    if not math.isfinite(error) or error <= 0:
        return f"{value:.4g}"
    places = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{places}f} ± {error:.{places}f}"
