"""The Jinja2 template and the style sheet of the report, filled by `report.py`, which says what may stand in them."""

STYLE = """
:root { color-scheme: light dark; --ink: #1d252c; --soft: #5a6772; --line: #d9e0e6; --paper: #ffffff;
  --panel: #f5f7f9; --accent: #0b6e8f; --before: #8a97a3; --notice: #fdf3dc; --notice-ink: #6b4a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4eaef; --soft: #9aa8b4; --line: #34404a; --paper: #12181d;
  --panel: #1a2229; --accent: #5cc3e4; --before: #7d8b97; --notice: #352a10; --notice-ink: #f0cf87; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 66rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .75rem; font-weight: 650; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 .25rem; padding-bottom: .35rem; border-bottom: 1px solid var(--line); }
.note { color: var(--soft); font-size: .85rem; margin: .4rem 0 .8rem; max-width: 46rem; }
.notice { background: var(--notice); color: var(--notice-ink); padding: .6rem .9rem; border-radius: 4px; margin: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .42rem .9rem .42rem 0; border-bottom: 1px solid var(--line);
  vertical-align: baseline; }
thead th { color: var(--soft); font-weight: 500; font-size: .8rem; white-space: nowrap; }
tbody th { font-weight: 500; }
.n { text-align: right; white-space: nowrap; }
.plot { width: 30%; min-width: 4rem; padding: .2rem .5rem; vertical-align: middle; }
.wide { min-width: 11rem; }
.plot svg { width: 100%; overflow: visible; display: block; }
@media (max-width: 32rem) { th, td { padding-right: .6rem; } .interval { font-size: .7rem; }
  tbody th { min-width: 6.8rem; } }
.interval { display: block; color: var(--soft); font-size: .78rem; }
.key i { display: inline-block; width: .6rem; height: .6rem; border-radius: 50%; margin: 0 .3rem 0 .8rem; }
.key i:first-child { margin-left: 0; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .9rem 1.5rem;
  margin: .9rem 0 0; }
dt { color: var(--soft); font-size: .8rem; overflow-wrap: anywhere; }
dd { margin: 0; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); gap: 1rem; }
figure { margin: 0; }
img { max-width: 100%; height: auto; display: block; }
.scroll img { max-width: none; }
figcaption { color: var(--soft); font-size: .8rem; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); gap: 1.2rem;
  margin-top: 1rem; }
.card { background: var(--panel); border: 1px solid var(--line); border-radius: 6px; overflow: hidden; }
.card > img { width: 100%; aspect-ratio: 1; object-fit: contain; background: var(--line); }
.card > div { padding: .8rem .9rem 1rem; }
.card h3 { font-size: 1rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
.card h4 { font-size: .8rem; color: var(--soft); font-weight: 500; margin: .9rem 0 .2rem; }
.card p { margin: .1rem 0 .6rem; font-size: .88rem; overflow-wrap: anywhere; }
.aspect { display: flex; align-items: center; gap: .5rem; color: var(--soft); font-size: .76rem; }
.bar { flex: 0 0 4rem; height: .35rem; background: var(--line); border-radius: 2px; margin-left: auto; }
.bar i { display: block; height: 100%; background: var(--accent); border-radius: 2px; }
.prediction { display: flex; align-items: center; gap: .5rem; font-size: .85rem; font-variant-numeric: tabular-nums; }
.prediction span:first-child { overflow-wrap: anywhere; }
.hit span:first-child { font-weight: 650; }
li { margin: .3rem 0; max-width: 46rem; }
@media print { .card, figure, tr { break-inside: avoid; } }
"""

PAGE = """
{%- macro estimate(e, decimals=3) -%}
{{ e.value | number(decimals) }}
{%- if e.low == e.low %}<span class="interval">{{ e.low | number(decimals) }} to {{ e.high | number(decimals) }}</span>
{%- endif %}
{%- endmacro -%}
{%- macro whisker(e, y, colour) -%}
{% if e.value == e.value %}<line x1="{{ e.low | percent }}%" x2="{{ e.high | percent }}%" y1="{{ y }}" y2="{{ y }}"
 stroke="var({{ colour }})" stroke-width="2"/>
<circle cx="{{ e.value | percent }}%" cy="{{ y }}" r="3.5" fill="var({{ colour }})"/>{% endif %}
{%- endmacro -%}
{%- macro picture(chart, alt) -%}
<picture><source media="(prefers-color-scheme: dark)" srcset="{{ chart.dark }}">
<img src="{{ chart.light }}" width="{{ chart.width }}" alt="{{ alt }}"></picture>
{%- endmacro -%}
{%- macro bar(share) -%}
<span class="bar"><i style="width: {{ share | percent }}%"></i></span>{{ share | number(2) }}
{%- endmacro -%}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ report.title }}</title>
<style>{{ style | safe }}</style>
</head>
<body>
<h1>{{ report.title }}</h1>
{% if report.subtitle %}
<p class="notice">{{ report.subtitle }}</p>
{% endif %}
{% if report.facts or report.stages_s %}
<h2>Run</h2>
<dl>
{% for name, value in report.facts.items() %}
<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{% endfor %}
{% for name, seconds in report.stages_s.items() %}
<div><dt>{{ name }}</dt><dd>{{ "%.1f" | format(seconds) }} s</dd></div>
{% endfor %}
</dl>
{% endif %}
{% if report.metrics %}
<h2>{{ "Before and after training" if has_before else "Results" }}</h2>
<p class="note">Value and {{ "%g" | format(report.confidence * 100) }} % interval; n counts the images or queries.
<span class="key">{% if has_before %}<i style="background: var(--before)"></i>before {% endif %}
<i style="background: var(--accent)"></i>after</span>; dotted: chance; the scale runs from 0 to 1.</p>
<div class="scroll" tabindex="0" role="region" aria-label="metrics"><table>
<thead><tr><th>Metric</th>{% if has_before %}<th class="n">Before</th>{% endif %}<th class="n">After</th>
<th class="n">Chance</th><th class="n">n</th><th></th></tr></thead>
<tbody>
{% for row in report.metrics %}
{% set decimals = 3 if row.is_share else 1 %}
<tr><th>{{ row.name | breakable }}</th>
{% if has_before %}<td class="n">{% if row.before %}{{ estimate(row.before, decimals) }}{% endif %}</td>{% endif %}
<td class="n">{{ estimate(row.after, decimals) }}</td>
<td class="n">{% if row.chance is not none %}{{ row.chance | number(decimals) }}{% endif %}</td>
<td class="n">{{ row.after.n }}</td>
<td class="plot wide">{% if row.is_share %}<svg height="26" aria-hidden="true">
<line x1="0" x2="100%" y1="25" y2="25" stroke="var(--line)"/>
{% if row.chance is not none %}<line x1="{{ row.chance | percent }}%" x2="{{ row.chance | percent }}%" y1="2" y2="25"
 stroke="var(--soft)" stroke-dasharray="2 2"/>{% endif %}
{% if row.before %}{{ whisker(row.before, 8, "--before") }}{% endif %}
{{ whisker(row.after, 17, "--accent") }}</svg>{% endif %}</td></tr>
{% endfor %}
</tbody></table></div>
{% endif %}
{% if report.losses %}
<h2>Training curves</h2>
<div class="charts">
{% for name, chart in charts.items() %}
<figure>{{ picture(chart, name ~ " by training step") }}
{% if num_not_finite[name] %}<figcaption>{{ num_not_finite[name] }} values are not finite: gaps.</figcaption>{% endif %}
</figure>
{% endfor %}
</div>
{% endif %}
{% if report.per_class_recall %}
<h2>Recall of each class</h2>
<div class="scroll" tabindex="0" role="region" aria-label="recall of each class"><table>
<thead><tr><th>Class</th><th class="n">Images</th><th class="n">Recall</th><th></th></tr></thead>
<tbody>
{% for name, recall in report.per_class_recall.items() %}
<tr><th>{{ name }}</th><td class="n">{{ recall.n }}</td><td class="n">{{ estimate(recall) }}</td>
<td class="plot"><svg height="18" aria-hidden="true"><line x1="0" x2="100%" y1="17" y2="17" stroke="var(--line)"/>
{{ whisker(recall, 8, "--accent") }}</svg></td></tr>
{% endfor %}
</tbody></table></div>
{% endif %}
{% if confusion %}
<h2>Confusion matrix</h2>
<p class="note">Counts of images; the shade is the share of the true class (the row).</p>
<div class="scroll" tabindex="0" role="region" aria-label="confusion matrix">
{{ picture(confusion, "confusion matrix; its counts are in the data block of this page") }}</div>
{% endif %}
{% if report.gallery %}
<h2>Examples</h2>
<p class="note">Bars beside texts are their training weights; those beside classes are zero-shot probabilities.</p>
<div class="gallery">
{% for item in report.gallery %}
<article class="card"><img src="{{ item.jpeg | jpeg }}" alt="example image {{ loop.index }}">
<div><h3>{{ item.diagnosis or "no diagnosis" }}</h3>
{% for caption in item.captions %}
<div class="aspect">{{ caption.aspect }}
{% if caption.weight is not none %}{{ bar(caption.weight) }}{% endif %}</div>
<p>{{ caption.text }}</p>
{% endfor %}
{% if item.predictions %}<h4>Zero-shot prediction</h4>{% endif %}
{% for name, share in item.predictions %}
<div class="prediction{{ " hit" if name == item.diagnosis else "" }}"><span>{{ name }}</span>
{{ bar(share) }}</div>
{% endfor %}
</div></article>
{% endfor %}
</div>
{% endif %}
{% if report.limits %}
<h2>Limits</h2>
<ul>
{% for sentence in report.limits %}
<li>{{ sentence }}</li>
{% endfor %}
</ul>
{% endif %}
<script type="application/json" id="numbers">{{ numbers | tojson }}</script>
</body>
</html>
"""
