"""The page's HTML. Rendered with autoescape on; put in unescaped are base64 images, Bokeh's script, and JSON without `<`."""

PAGE = """{% macro table(headings, rows, kind="") %}
<div class="scroll" tabindex="0"><table{% if kind %} class="{{ kind }}"{% endif %}>
<thead><tr>{% for heading in headings %}<th scope="col">{{ heading }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}
<tr>{% for cell in row %}
<td>{% if cell is string %}{{ cell }}{% else %}{{ cell[0] }}
<small{% if cell[1] in ("better", "worse") %} class="{{ cell[1] }}"{% endif %}>{{ cell[1] }}</small>{% endif %}</td>
{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div>
{%- endmacro %}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ name }} · moepress</title>
<style>
:root { --ground: #fbfaf8; --card: #ffffff; --ink: #1f2328; --soft: #5c6570; --line: #e1ded8; --accent: #b84e00;
  --good: #0062a3; --best: #f6a04d2e; --group: #7d6f4f1c; --code: #f1efea; --paper: #ffffff; --shade: #00000047; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #16181b; --card: #1e2125; --ink: #e6e4df; --soft: #a2a9b1; --line: #34383e; --accent: #ff9d5c;
    --good: #7cc0ee; --best: #ff9d5c1f; --group: #8e99a624; --code: #282c31; --paper: #eceae6; --shade: #000000b3; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.6 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; -webkit-text-size-adjust: 100%; }
main { max-width: 1200px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 3rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .3rem; }
p { max-width: 75ch; margin: .5rem 0; overflow-wrap: anywhere; }
.kind { color: var(--accent); font-weight: 600; letter-spacing: .02em; margin: 0 0 .3rem; }
.caption { font-size: 1.1rem; color: var(--soft); }
.summary { margin-top: 1.5rem; padding: .4rem 1.1rem; border-left: 4px solid var(--accent); background: var(--card); }
.summary ul { margin: .5rem 0; padding-left: 1.1rem; }
.summary li { margin: .25rem 0; max-width: 95ch; overflow-wrap: anywhere; }
.note, figcaption { color: var(--soft); font-size: .9rem; }
/* What can be scrolled has a shadow on that side: the first two layers move with the content and cover the shadows, which
   stand still, at its ends. Cells and figures above them let them through. */
.scroll, .picture { --under: var(--card); overflow-x: auto; border: 1px solid var(--line); border-radius: 8px;
  background: linear-gradient(to right, var(--under) 40%, transparent) left / 3.5rem 100% no-repeat local,
    linear-gradient(to left, var(--under) 40%, transparent) right / 3.5rem 100% no-repeat local,
    linear-gradient(to right, var(--shade), transparent) left / 1.3rem 100% no-repeat scroll,
    linear-gradient(to left, var(--shade), transparent) right / 1.3rem 100% no-repeat scroll, var(--under); }
.scroll { margin: .8rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .42rem .6rem; text-align: right; vertical-align: top; white-space: nowrap;
  border-top: 1px solid var(--line); line-height: 1.4; }
thead th { border-top: 0; color: var(--soft); font-weight: 600; white-space: normal; vertical-align: bottom;
  line-height: 1.3; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; z-index: 1; min-width: 9.5rem;
  max-width: 46vw; white-space: normal; overflow-wrap: break-word; background: var(--card); }
table.plain td, table.plain th { text-align: left; }
table.plain td { white-space: normal; overflow-wrap: break-word; }
table.costs tbody tr:last-child td { font-weight: 650; border-top-width: 2px; }
tr.size th { background: var(--group); text-align: left; font-weight: 600; padding: .3rem .6rem; max-width: none; }
tr.best td { background: var(--best); }
tr.best td:first-child { font-weight: 650; background: linear-gradient(var(--best), var(--best)), var(--card); }
.mark { color: var(--accent); }
small.better { color: var(--good); }
small.worse { color: var(--accent); }
small { display: block; color: var(--soft); font-weight: 400; font-size: .78rem; line-height: 1.35; }
figure { margin: .8rem 0 0; }
.picture { --under: var(--paper); padding: .8rem; }
.picture.live { --under: var(--card); margin: .8rem 0; }
.picture img { display: block; width: 100%; min-width: min(620px, 100%); height: auto; margin: 0 auto;
  mix-blend-mode: multiply; }
@media (prefers-color-scheme: dark) { .picture:not(.live) { border-radius: 12px; border: 0; } }
@media (max-width: 640px) { .picture img { min-width: 620px; } }
figcaption { max-width: 85ch; margin-top: .5rem; }
dl { display: grid; grid-template-columns: minmax(9rem, 15rem) 1fr; gap: .25rem 1.2rem; margin: .4rem 0;
  font-size: .92rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
code { background: var(--code); border-radius: 4px; padding: .05rem .3rem; font-size: .85em; overflow-wrap: anywhere; }
summary { cursor: pointer; font-weight: 600; margin-top: 1rem; }
@media (max-width: 640px) {
  main { padding: 1.5rem .9rem 3rem; }
  h1 { font-size: 1.6rem; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .6rem; }
  .summary { padding: .3rem .9rem; }
  table.costs th, table.costs td { padding-inline: .38rem; min-width: 0; }
}
@media print { .scroll, .picture { overflow: visible; border: 0; } details > * { display: block; } }
</style>
</head>
<body>
<main>
<p class="kind">moepress · what compression costs</p>
<h1>{{ name }}</h1>
{% if caption %}<p class="caption">{{ caption }}</p>{% endif %}
<section class="summary"><ul>{% for sentence in sentences %}<li>{{ sentence }}</li>{% endfor %}</ul></section>

<h2>Results</h2>
<div class="scroll" tabindex="0"><table>
<thead><tr>{% for heading in headings %}<th scope="col">{{ heading }}</th>{% endfor %}</tr></thead>
<tbody>
{% for group in groups %}
<tr class="size"><th colspan="{{ headings | length }}" scope="rowgroup">{{ group.title }}</th></tr>
{% for row in group.rows %}
<tr class="{{ row.mark }}">
{% for heading in headings %}{% set cell, small = row.cells[heading] %}
<td>{{ cell }}{% if loop.first and row.mark %} <span class="mark">{{ marks[row.mark] }}</span>{% endif %}
{% if small %}<small>{{ small }}</small>{% endif %}</td>
{% endfor %}
</tr>
{% endfor %}
{% endfor %}
</tbody>
</table></div>
<p class="note">{% if repeated %}The same in all rows that have it: {% for heading, words in repeated.items() %}
{{ heading }} {{ words }}{{ ". " if loop.last else ", " }}{% endfor %}
{% endif %}{{ legend }} All columns at full precision: <code>runs.csv</code>.</p>
<h2>Look closer</h2>
<p class="note">Point at a dot or a cell for its numbers; a click on a name hides its method.</p>
{% for id, title in pictures.titles.items() %}
<div class="picture live" id="{{ id }}" role="figure" aria-label="{{ title }}"></div>
{% endfor %}
{% for library in libraries %}<script>{{ library | safe }}</script>
{% endfor %}
<script type="application/json" id="live-data">{{ pictures.data | safe }}</script>
<script>Bokeh.embed.embed_items(...JSON.parse(document.getElementById("live-data").textContent))</script>

<details>
<summary>Perplexity by domain</summary>
{{ table(*domain_table) }}
<p class="note">Per token, with one standard error over blocks (how much the text varies, which all runs share); below it bits
per byte of text, which models with other tokenizers can be compared by.</p>
</details>
{% if task_table %}
<details>
<summary>Scores by task</summary>
{{ table(*task_table) }}
<p class="note">With one standard error over items. * of the first items only. Metric, version and protocol of each:
<code>tasks.json</code> in the evaluation's folder.</p>
</details>
{% endif %}

{% if paired_table %}
<details>
<summary>Paired comparisons</summary>
{{ table(*paired_table) }}
<p class="note">Over the same blocks or items, with the 95 % confidence interval (Student's) in brackets; perplexity in percent,
accuracy in points. One interval in twenty misses by chance. All at full precision: <code>figures/differences.csv</code>.</p>
</details>
{% endif %}

{% for figure in figures %}
<h2>{{ figure.title }}</h2>
<figure>
<div class="picture" tabindex="0"><img style="max-width: {{ figure.width }}px"
alt="{{ figure.title }}. {{ figure.caption }}"
src="data:image/svg+xml;base64,{{ figure.base64 }}"></div>
<figcaption>{{ figure.caption }} <code>figures/{{ figure.name }}.csv</code></figcaption>
</figure>
{% endfor %}

<h2>How the numbers were made</h2>
{% for heading, rows in facts.items() %}
<h3>{{ heading }}</h3>
<dl>
{% for term, text in rows.items() %}<dt>{{ term }}</dt><dd>{{ text }}</dd>
{% endfor %}
</dl>
{% endfor %}
<h3 id="costs">What they cost</h3>
{{ table(*cost_table, kind="costs") }}
<p class="note">Every artefact of these runs counts once, however many runs share it and whenever it was made; those that were
made side by side shared the machine. Below a time is its share of the whole. Processor time is that of all threads. Memory is
the most that one process had, pages of mapped files included. Each artefact: <code>costs.csv</code>.</p>
<h3>Sources of the text</h3>
{{ table(*sources, kind="plain") }}
<details>
<summary>Artefacts of each run</summary>
<p class="note">Folders below the results folder; each has its <code>config.yaml</code> and
<code>provenance.json</code>.</p>
{% for run in runs %}
<h3>{{ run.name }}</h3>
<dl>{% for stage, folder in run.artefacts.items() %}
<dt>{{ stage }}</dt><dd><code>{{ folder }}</code></dd>{% endfor %}
</dl>
{% endfor %}
</details>
</main>
</body>
</html>
"""
