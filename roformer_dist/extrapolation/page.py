"""The report as one HTML file: no scripts, nothing loaded from elsewhere, light and dark."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from html import escape

from roformer_dist.extrapolation.result import LABELS, SweepResult, findings
from roformer_dist.extrapolation.retrieval import RetrievalResult
from roformer_dist.extrapolation.retrieval_report import retrieval_section

_STYLE = """
:root { color-scheme: light dark; --text: #1b1b1f; --back: #ffffff; --soft: #5b5b66; --line: #d5d5dd;
  --best: #e3f4ea; }
@media (prefers-color-scheme: dark) { :root { --text: #ececf1; --back: #17171b; --soft: #a9a9b6;
  --line: #3a3a44; --best: #173d2a; } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--text); background: var(--back);
  max-width: 68rem; margin: 0 auto; padding: 1.5rem; }
h1 { font-size: 1.6rem; line-height: 1.25; overflow-wrap: anywhere; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
p, li { max-width: 52rem; } .soft, figcaption, small { color: var(--soft); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .9rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } td.best { background: var(--best); font-weight: 600; }
td small { display: block; font-weight: 400; } caption { caption-side: bottom; text-align: left;
  padding-top: .6rem; color: var(--soft); font-size: .9rem; }
figure { margin: 1rem 0; } figure img { width: 100%; background: #ffffff; border-radius: 6px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.2rem; } dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
"""

_READING = """
<ul>
<li><b>Cropped</b> is the bar. It never sees more than the trained length, so it is what you can have without
any extension. A rule that does not come out below it gains nothing from the longer context.</li>
<li><b>Down each column</b> the model, the targets and the context are the same; only the rotation differs.
<b>Along each row</b> the targets are the same too; only the context before them grows.</li>
<li><b>Judge by the difference, not by the level.</b> Documents differ in difficulty far more than methods do,
so the interval of a perplexity is wide; the difference to cropped is taken target by target, and its
interval (95 %, by document) is what separates two methods. 0.01 nats are about 1 % of perplexity.</li>
<li><b>By position</b>, a curve that rises after the trained length is a model that is lost; one that lies
above cropped already before it pays for its rule on short contexts.</li>
<li><b>Perplexity is not retrieval.</b> A model can keep its perplexity by looking at the nearest tokens only.
Whether it finds something far back, retrieval by depth says.</li>
</ul>
"""


def render_page(
    result: SweepResult,
    checkpoint: str,
    step: int,
    documents: str,
    pngs: Mapping[str, bytes],
    retrieval: RetrievalResult | None = None,
) -> str:
    """The whole page. Names are escaped; ``pngs`` holds the figures by name."""
    trained, longest = f"{result.trained_seq_len:,}", f"{result.longest:,}"
    said = "".join(f"<li>{escape(sentence)}</li>" for sentence in findings(result))
    by_length = _figure(
        pngs["perplexity_by_length"],
        f"The same {result.targets:,} targets with {result.lengths[0]:,} to {longest} tokens of context. "
        "Left: the grey band is the interval of the cropped model. Right: paired differences.",
    )
    by_position = _figure(
        pngs["perplexity_by_position"],
        f"Every target of the {longest}-token windows, by the number of tokens before it; "
        f"each rule with the factor of {longest} tokens.",
    )
    found = ""
    if retrieval is not None:
        caption = "Passages found, by length of the context and depth in it; depth 0 % is the farthest."
        found = retrieval_section(retrieval, _figure(pngs["retrieval_by_depth"], caption))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Extrapolation of {escape(checkpoint)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>Past the trained length: {escape(checkpoint)}</h1>
<p class="soft">Trained on {trained} tokens, asked to read {longest} ({result.longest / result.trained_seq_len:g}
times as many) without further training.</p>
<ul>{said}</ul>
<h2>Perplexity by context length</h2>
<div class="scroll">{_table(result)}</div>
{by_length}
<h2>Perplexity by position</h2>
{by_position}
{found}<h2>How to read it</h2>
{_READING}
<h2>What was evaluated</h2>
{_facts(result, checkpoint, step, documents)}
</body>
</html>
"""


def _table(result: SweepResult) -> str:
    head = "".join(
        f"<th scope='col'>{length:,}<br><small>&times; {length / result.trained_seq_len:g}</small></th>"
        for length in result.lengths
    )
    body = []
    for row in result.rows:
        cells = [_cell(result, row, length) for length in result.lengths]
        body.append(f"<tr><td>{escape(LABELS[row])}</td>{''.join(cells)}</tr>")
    return (
        f"<table><thead><tr><th scope='col'>context, tokens</th>{head}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody>"
        "<caption>Perplexity; below it the difference to cropped in nats per token and its 95 % interval. "
        "★ lowest of the column.</caption></table>"
    )


def _cell(result: SweepResult, row: str, length: int) -> str:
    point = result.at(row, length)
    best = result.best(length) == row
    gap = point.minus_cropped
    if gap.mean == gap.low == gap.high == 0 or (gap.mean == 0 and math.isnan(gap.low)):
        detail = "same as cropped" if row != "cropped" else "&nbsp;"
    elif math.isnan(gap.low):
        detail = f"{gap.mean:+.3f}"
    else:
        detail = f"{gap.mean:+.3f} ({gap.low:+.3f} to {gap.high:+.3f})"
    mark = "★ " if best else ""
    return (
        f"<td{' class=best' if best else ''}>{mark}{point.nll.perplexity[0]:,.1f}<small>{detail}</small></td>"
    )


def _figure(png: bytes, caption: str) -> str:
    data = base64.b64encode(png).decode()
    text = escape(caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'


def _facts(result: SweepResult, checkpoint: str, step: int, documents: str) -> str:
    half, trained = result.scored, result.trained_seq_len
    facts = {
        "Checkpoint": checkpoint,
        "Step": f"{step:,}",
        "Held-out text": documents,
        "Documents": f"{result.documents} used; {result.too_short} too short for {result.longest:,} tokens",
        "Targets": f"{result.targets:,}: the last {half:,} of each of {result.windows:,} windows",
        "Tokens fed": f"{result.tokens:,}",
        "Protocol": (
            f"Same suffix: the same targets are scored at every length, and the context grows backwards. A target "
            f"sees between length - {half - 1:,} and length tokens. Weighted by token."
        ),
        "Cropped": (
            f"The unscaled model in windows of {trained:,} tokens that slide by {half:,}: every target sees "
            f"between {trained - half + 1:,} and {trained:,} tokens, or all there are."
        ),
        "Scaling factor": f"length / {trained:,} for each length; by position, {result.longest / trained:g}",
        "Intervals": f"95 %, clustered by document (Student's t, {result.documents} documents)",
    }
    pairs = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return f"<dl>{pairs}</dl>"
