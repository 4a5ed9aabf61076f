"""report.html: one self-contained page of what a report says."""

from __future__ import annotations

import io
from typing import Any

import jinja2
import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt

from pipeline.evaluation.benchmark import COUPLED

BLUE, ORANGE, GREY = "#1f5fa8", "#c96a12", "#8a8f98"

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>draftline report: {{ r.target.id }}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body{font:16px/1.5 system-ui,sans-serif;color:#1c1f24;background:#fff;max-width:1060px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem;margin:0}h2{font-size:1.15rem;margin:2.2rem 0 .4rem}p{margin:.3rem 0 .8rem;color:#4a4f57}

.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.6rem,1fr));gap:.7rem;margin:1.2rem 0}
.tile{border:1px solid #d9dde3;border-radius:8px;
padding:.7rem .9rem}.tile b{display:block;font-size:1.55rem;line-height:1.2}.tile span{color:#4a4f57;
font-size:.85rem}table{border-collapse:collapse;width:100%;font-size:.92rem}th,td{text-align:right;padding:.35rem .6rem;
border-bottom:1px solid #e6e9ee}th:first-child,td:first-child{text-align:left}th{color:#4a4f57;font-weight:600}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(440px,1fr));gap:1rem}figure{margin:0}
figcaption{font-size:.85rem;color:#4a4f57}svg{max-width:100%;height:auto}footer{margin-top:2.5rem;font-size:.82rem;
color:#4a4f57;word-break:break-all}.good{color:#156c3a}.bad{color:#a32020}
</style></head><body>
<h1>Draft for {{ r.target.id }}</h1>
<p>Measured on {{ r.arms.none.prompts }} held-out prompts, every arm by the same engine in the same process.
Greedy output equals plain decoding:
{% if r.exact_greedy %}<b class="good">yes, token for token</b>{% else %}<b class="bad">NO</b>{% endif %}.
Sampled output equals plain sampling for the same seed (coupled rule):
{{ seeded.same_text }} of {{ seeded.prompts }}.</p>
<p>The headline is of the arms <i>draft</i> and <i>draft t1</i>, which decode as serving does: scheduler
{{ r.arms.draft.scheduler }}, rule {{ r.arms.draft.rule }}.</p>
<div class="tiles">
<div class="tile"><b>{{ "%.2f"|format(h.speedup) }}x</b><span>speedup, greedy
({{ "%.2f"|format(h.speedup_low) }} to {{ "%.2f"|format(h.speedup_high) }})</span></div>
<div class="tile"><b>{{ "%.2f"|format(h.tau) }}</b><span>tau, scheduled</span></div>
<div class="tile"><b>{{ "%.2f"|format(h.tau_fixed) }}</b><span>tau, whole blocks</span></div>
<div class="tile"><b>{{ "%.0f"|format(100 * h.accept_rate) }} %</b><span>acceptance rate
(accepted / drafted)</span></div>
<div class="tile"><b>{{ "%.2f"|format(h.speedup_t1) }}x</b><span>speedup, temperature
{{ "%g"|format(r.arms["draft t1"].temperature) }} ({{ "%.2f"|format(h.speedup_t1_low) }} to
{{ "%.2f"|format(h.speedup_t1_high) }})</span></div>
<div class="tile"><b>{{ "%.2f"|format(h.ngram_speedup) }}x</b><span>ngram, greedy</span></div>
</div>
<h2>Arms</h2>
<table><tr><th>arm</th><th>scheduler</th><th>rule</th><th>tau</th><th>accepted / drafted</th><th>/ verified</th>
<th>tokens/s</th>
<th>speedup</th><th>95 % interval</th><th>totals</th><th>drafting</th><th>same text</th></tr>
{% for name, a in r.arms.items() %}<tr><td>{{ name }}</td><td>{{ a.scheduler if a.proposer != "none" else "" }}</td>
<td>{{ a.rule if a.temperature else "" }}</td><td>{{ "%.2f"|format(a.tau) }}</td>
<td>{{ "%.2f"|format(a.accept_rate) if a.proposer != "none" else "" }}</td>
<td>{{ "%.2f"|format(a.verified_accept_rate) if a.proposer != "none" else "" }}</td>
<td>{{ "%.1f"|format(a.tokens_per_second) }}</td><td>{{ "%.2f"|format(a.speedup) }}</td>
<td>{{ "%.2f"|format(a.low) }} to {{ "%.2f"|format(a.high) }}</td><td>{{ "%.2f"|format(a.totals) }}</td>
<td>{{ "%.0f"|format(100 * a.draft_share) }} %</td>
<td>{{ a.same_text }}/{{ a.prompts }}</td></tr>{% endfor %}</table>
<p>Under the ratio rule a seed's text depends on the draft by design; its distribution is the target's all the same.</p>
<div class="plots">{% for caption, svg in plots %}<figure>{{ svg }}<figcaption>{{ caption }}</figcaption></figure>
{% endfor %}</div>
<h2>Calibration by position</h2>
<p>Measured on the evaluation prompts, whole blocks verified. {% if r.calibration_rounds %}The temperatures
were fitted by the calibrate stage on {{ r.calibration_rounds }} rounds.{% else %}<b class="bad">This draft was not
calibrated.</b>{% endif %}</p>
<table><tr><th>position</th><th>rounds that reached it</th><th>temperature</th><th>error before</th><th>after</th>
<th>AUC</th></tr>{% for p in r.calibration.positions %}<tr><td>{{ p.position }}</td>
<td>{{ p.rounds }}{{ " (few)" if p.too_few }}</td><td>{{ "%.2f"|format(p.temperature) }}</td>
<td>{{ "%.3f"|format(p.ece_before) }}</td><td>{{ "%.3f"|format(p.ece_after) }}</td>
<td>{{ "%.3f"|format(p.auc) if p.auc is not none else "one outcome only" }}</td></tr>{% endfor %}</table>
<h2>By source</h2>
<table><tr><th>source</th><th>prompts</th><th>tau</th><th>median speedup</th></tr>
{% for s in sources %}<tr><td>{{ s.source }}</td><td>{{ s.prompts }}</td><td>{{ "%.2f"|format(s.tau) }}</td>
<td>{{ "%.2f"|format(s.speedup) }}</td></tr>{% endfor %}</table>
<footer><h2>Provenance</h2>
{% for k, v in r.conventions.items() %}{{ k }}: {{ v }}.<br>{% endfor %}
target revision {{ r.target.revision }}, weights {{ r.target.weight_digest }},
config {{ r.target.config_digest }}, tokenizer {{ r.target.tokenizer_digest }}
<br>draft {{ r.draft_digest }}<br>corpus {{ r.corpus_digest }}<br>evaluation set {{ r.evaluation_set_digest }}
<br>code {{ r.provenance.code_version }}, torch {{ r.provenance.torch }}, {{ r.provenance.machine }}
<br>settings {{ r.provenance.settings|tojson }}</footer></body></html>
"""


def render(report: dict[str, Any]) -> str:
    """The page of a report.json; no external assets."""
    environment = jinja2.Environment(autoescape=True)
    page = environment.from_string(PAGE)
    plots = [
        ("Acceptance of a position given all before it (bars) and survival of the prefix (line).", _positions(report)),
        ("Speedup over plain decoding with 95 % intervals.", _speedups(report)),
        ("Calibration of prefix survival, all positions: before and after temperature scaling.", _reliability(report)),
        ("Calibration error by position.", _ece(report)),
        ("How many draft tokens were verified per round (scheduled, greedy).", _lengths(report)),
        ("Each prompt: tau and speedup (scheduled, greedy).", _prompts(report)),
    ]
    return page.render(
        r=report,
        h=report["headline"],
        seeded=report["arms"].get(COUPLED, report["arms"]["draft t1"]),
        plots=[(caption, jinja2.utils.markupsafe.Markup(svg)) for caption, svg in plots],
        sources=_sources(report),
    )


def _figure() -> tuple[Any, Any]:
    figure, axes = plt.subplots(figsize=(5.4, 3.4), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e9ee")
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Any) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    text = out.getvalue()
    return text[text.index("<svg") :]


def _positions(r: dict[str, Any]) -> str:
    figure, axes = _figure()
    for shift, name, colour in ((-0.2, "draft fixed", BLUE), (0.2, "ngram", ORANGE)):
        rows = [p for p in r["arms"][name]["positions"] if p["offered"]]
        x = [p["position"] for p in rows]
        value = [p["acceptance"] for p in rows]
        error = [[p["acceptance"] - p["low"] for p in rows], [p["high"] - p["acceptance"] for p in rows]]
        axes.bar([i + shift for i in x], value, 0.38, color=colour, yerr=error, capsize=2, ecolor="#444", label=name)
        axes.plot(x, [p["survival"] for p in rows], color=colour, marker="o", ms=3, ls="--", lw=1)
    axes.set(xlabel="position in the block", ylabel="acceptance", ylim=(0, 1))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False)
    return _svg(figure)


def _speedups(r: dict[str, Any]) -> str:
    figure, axes = _figure()
    arms = [(n, a) for n, a in r["arms"].items() if a["proposer"] != "none"][::-1]
    y = list(range(len(arms)))
    value = [a["speedup"] for _, a in arms]
    error = [[max(0, a["speedup"] - a["low"]) for _, a in arms], [max(0, a["high"] - a["speedup"]) for _, a in arms]]
    axes.barh(y, value, xerr=error, color=[ORANGE if a["proposer"] == "ngram" else BLUE for _, a in arms], capsize=3)
    axes.axvline(1, color="#444", lw=1)
    axes.set_yticks(y, [n for n, _ in arms])
    axes.set(xlabel="speedup")
    return _svg(figure)


def _reliability(r: dict[str, Any]) -> str:
    figure, axes = _figure()
    axes.plot([0, 1], [0, 1], color=GREY, lw=1)
    for key, colour, label in (("reliability_before", ORANGE, "before"), ("reliability_after", BLUE, "after")):
        points = [b for p in r["calibration"]["positions"] for b in p[key] if b["count"] >= 3]
        axes.scatter(
            [b["predicted"] for b in points],
            [b["observed"] for b in points],
            s=[4 + b["count"] ** 0.5 * 3 for b in points],
            color=colour,
            alpha=0.6,
            label=label,
            linewidths=0,
        )
    axes.set(xlabel="predicted survival", ylabel="observed", xlim=(0, 1), ylim=(0, 1))
    axes.legend(frameon=False)
    return _svg(figure)


def _ece(r: dict[str, Any]) -> str:
    figure, axes = _figure()
    rows = r["calibration"]["positions"]
    x = [p["position"] for p in rows]
    axes.bar([i - 0.2 for i in x], [p["ece_before"] for p in rows], 0.38, color=ORANGE, label="before")
    axes.bar([i + 0.2 for i in x], [p["ece_after"] for p in rows], 0.38, color=BLUE, label="after")
    axes.set(xlabel="position in the block", ylabel="expected calibration error")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False)
    return _svg(figure)


def _lengths(r: dict[str, Any]) -> str:
    figure, axes = _figure()
    lengths = r["arms"]["draft"]["lengths"]
    axes.bar([int(k) for k in lengths], list(lengths.values()), color=BLUE)
    axes.set(xlabel="verified tokens", ylabel="rounds")
    return _svg(figure)


def _prompts(r: dict[str, Any]) -> str:
    figure, axes = _figure()
    rows = r["arms"]["draft"]["per_prompt"]
    axes.scatter([p["tau"] for p in rows], [p["speedup"] for p in rows], color=BLUE, alpha=0.7)
    axes.axhline(1, color="#444", lw=1)
    axes.set(xlabel="tau", ylabel="speedup")
    return _svg(figure)


def _sources(r: dict[str, Any]) -> list[dict[str, Any]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for p in r["arms"]["draft"]["per_prompt"]:
        groups.setdefault(p["source"], []).append(p)
    out = []
    for source, rows in sorted(groups.items()):
        ranked = sorted(p["speedup"] for p in rows)
        middle = (ranked[(len(ranked) - 1) // 2] + ranked[len(ranked) // 2]) / 2
        tau = sum(p["tau"] for p in rows) / len(rows)
        out.append({"source": source, "prompts": len(rows), "tau": tau, "speedup": middle})
    return out
