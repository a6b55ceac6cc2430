"""The report of a quantization: a JSON object and one self-contained HTML page.

The page loads nothing (no scripts, fonts, images or links), so it can be kept beside the model and mailed.
Names and paths come from files and are escaped.

A report is a dict:
    model, output   what was read and written
    version         of lowbit
    recipe          what was asked for
    calibration     {"source", "tokens", "context"}
    modules         one dict a packed matrix, as lowbit.quantize reports them: name, shape [N, K], format,
                    group_size, bits_per_weight, relative_error, error_of, damp, seconds, fallback
    kept            one dict a matrix left as it was: name, shape, reason
    totals          {"modules", "bytes_before", "bytes_after", "bits_per_weight", "seconds"}
    evaluation      Evaluation.to_dict(), or None
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

# Okabe and Ito's palette: told apart with every common kind of colour vision, on white and on dark grey.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8a8a8a", "#a59400")
_DASHES = ("", "6 3", "2 3")


def write_report(report: dict[str, Any], folder: str | Path) -> tuple[Path, Path]:
    """Writes report.html and report.json into the folder and returns their paths."""
    page, data = Path(folder) / "report.html", Path(folder) / "report.json"
    data.write_text(to_json(report) + "\n", "utf-8")
    page.write_text(to_html(report), "utf-8")
    return page, data


def to_json(value: Any, indent: int | None = 2) -> str:
    """JSON as the standard has it: a number that is not finite becomes null, anything unknown its text."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def split_names(names: Sequence[str]) -> list[tuple[int | None, str]]:
    """Each module name as (layer, rest): "model.layers.3.self_attn.q_proj" is (3, "self_attn.q_proj").

    The layer is the first number in the name, None where there is none. What stands before it is dropped when
    it is the same for every layer of the model, and kept when the model has several stacks
    ("vision.3.mlp.fc1").
    """
    parts = [re.fullmatch(r"(?:(.*?)\.)?(\d+)\.(.+)", name) for name in names]
    stacks = {match[1] for match in parts if match}
    split: list[tuple[int | None, str]] = []
    for name, match in zip(names, parts, strict=True):
        if match is None:
            split.append((None, name))
        else:
            split.append((int(match[2]), match[3] if len(stacks) == 1 else f"{match[1] or ''}.*.{match[3]}"))
    return split


def human_bytes(count: float) -> str:
    """In decimal units, as disks and model hubs count: "7.3 MB"."""
    units = ["B", "kB", "MB", "GB"]
    while count >= 999.5 and len(units) > 1:
        count /= 1000
        del units[0]
    return f"{count:.0f} {units[0]}" if units[0] == "B" or count >= 99.95 else f"{count:.1f} {units[0]}"


def human_figure(value: float | None) -> str:
    """A few significant digits, "-" for None."""
    if value is None:
        return "-"
    if value == 0 or not math.isfinite(value):
        return str(value) if value else "0"
    return f"{value:.2f}" if 9.995 <= abs(value) < 1e6 else f"{value:.3g}"


# ---- the page ----

_STYLE = """
:root { color-scheme: light dark;
        --text: #1b1f24; --faint: #6a737d; --line: #dfe3e8; --back: #ffffff; --card: #f5f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e7eb; --faint: #98a2ad; --line: #3a4149; --back: #171a1e; --card: #20252b; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back);
       max-width: 68rem; margin: 2.5rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; }
h2 { font-size: 1.1rem; margin: 2.4rem 0 .6rem; }
p { margin: .3rem 0; }
.faint { color: var(--faint); }
.wide { overflow-x: auto; }
dl.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr));
           gap: .8rem; margin: 1.6rem 0; }
dl.cards div { background: var(--card); border-radius: .5rem; padding: .7rem 1rem; }
dt { color: var(--faint); font-size: .8rem; }
dd { margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums; }
dd small { color: var(--faint); font-size: .8rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .7rem .25rem 0; border-bottom: 1px solid var(--line);
         white-space: nowrap; }
th { color: var(--faint); font-weight: 500; font-size: .85rem; }
td.number, th.number { text-align: right; }
td.words { white-space: normal; }
svg { width: 100%; height: auto; }
svg text { fill: var(--faint); font: 12px system-ui, sans-serif; }
svg .grid { stroke: var(--line); }
svg .axis { stroke: var(--faint); }
"""


def to_html(report: dict[str, Any]) -> str:
    """The page as text (see the head of this file for what a report holds)."""
    title = f"{report['model']} → {report['output']}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="faint">quantized by lowbit {escape(str(report["version"]))}</p>',
        _cards(report),
    ]
    chart = error_chart(report["modules"])
    if chart:
        body += [
            "<h2>Relative error by layer</h2>",
            f'<p class="faint">{_ERROR_EXPLAINED} Logarithmic; modules outside the layers are in the table.</p>',
            f'<div class="wide">{chart}</div>',
        ]
    body += ["<h2>Modules</h2>", _module_table(report["modules"])]
    if report["kept"]:
        kept = [(m["name"], _shape(m["shape"]), m["reason"]) for m in report["kept"]]
        body += ["<h2>Left as they were</h2>", _table(("module", "shape", "reason"), kept, words=("reason",))]
    for name in ("recipe", "calibration", "evaluation"):
        if report[name]:
            rows = [(key.replace("_", " "), _setting(value)) for key, value in report[name].items()]
            body += [f"<h2>{name.capitalize()}</h2>", _table((), rows, words=(1,))]
    return _page(title, body)


def _page(title: str, body: Sequence[str]) -> str:
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def sensitivity_to_html(report: dict[str, Any]) -> str:
    """The page of a sensitivity report: a dict of model, version, formats, by, modules, groups and perplexity as
    `lowbit.quantize.sensitivity.Sensitivity` has them, pareto [{bytes, loss}, ...], measure (what the loss is) and
    choice (None, or what a budget chose: bytes, loss)."""
    title = f"Sensitivity of {report['model']}"
    body = [f"<h1>{escape(title)}</h1>", f'<p class="faint">measured by lowbit {escape(str(report["version"]))}</p>']
    figure, name = ("kl_divergence", "group") if report["groups"] else ("relative_error", "name")
    rows = [row for row in report["groups"] or report["modules"] if row[figure] is not None]
    if report["groups"]:
        curves: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
        for row in sorted(rows, key=lambda row: row["bits_per_weight"]):
            curves[row[name]].append((row["bits_per_weight"], row[figure], f"{row[name]} as {row['format']}"))
        body += [
            "<h2>KL divergence with one group quantized</h2>",
            f'<p class="faint">Everything else as it is (perplexity {human_figure(report["perplexity"])}). '
            "Logarithmic.</p>",
            f'<div class="wide">{size_chart(curves, "bits a weight", "KL divergence")}</div>',
        ]
    for label in [] if report["groups"] else report["formats"]:
        chart = error_chart([row for row in rows if row["format"] == label])
        body += [f"<h2>Relative error as {escape(label)}</h2>", f'<div class="wide">{chart}</div>'] if chart else []
    curve = [(point["bytes"] / 1e6, point["loss"], human_bytes(point["bytes"])) for point in report["pareto"]]
    curves = {"best of its size": curve}
    if choice := report["choice"]:
        curves["chosen"] = [(choice["bytes"] / 1e6, choice["loss"], human_bytes(choice["bytes"]))]
    body += [
        "<h2>What bytes buy</h2>",
        f'<p class="faint">Loss over the bytes of the modules measured: {escape(report["measure"])}. Logarithmic.</p>',
        f'<div class="wide">{size_chart(curves, "MB", "loss")}</div>',
        "<h2>Table</h2>",
    ]
    found = {(row[name], row["format"]): row for row in rows}
    cells = [
        (each, *(human_figure(found.get((each, label), {}).get(figure)) for label in report["formats"]))
        for each in dict.fromkeys(row[name] for row in rows)
    ]
    body.append(_table((name, *report["formats"]), cells, report["formats"]))
    return _page(title, body)


_ERROR_EXPLAINED = (
    "For calibrated modules the error of the output on the calibration data, relative to the output; "
    "for modules rounded to nearest the error of the weight, relative to the weight."
)


def _cards(report: dict[str, Any]) -> str:
    totals, evaluation = report["totals"], report["evaluation"]
    before, after = totals["bytes_before"], totals["bytes_after"]
    fallbacks = sum(1 for module in report["modules"] if module["fallback"])
    cards = [
        ("Size", f"{human_bytes(before)} → {human_bytes(after)}", f"{after / before:.0%}" if before else ""),
        ("Bits per weight", human_figure(totals["bits_per_weight"]), f"{totals['modules']} modules"),
        ("Time", f"{totals['seconds']:.1f} s", ""),
        ("Fallbacks", str(fallbacks), "see the table" if fallbacks else ""),
    ]
    if evaluation:
        reference = human_figure(evaluation["reference_perplexity"])
        cards += [
            ("Perplexity", human_figure(evaluation["perplexity"]), f"from {reference}"),
            ("KL divergence", human_figure(evaluation["kl_divergence"]), "nats per token"),
        ]
    shown = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)} <small>{escape(note)}</small></dd></div>"
        for name, value, note in cards
    )
    return f'<dl class="cards">{shown}</dl>'


def _module_table(modules: Sequence[dict[str, Any]]) -> str:
    numbers = ("group", "bits/weight", "rel. error", "damp", "time")
    titles = ("module", "shape", "format", *numbers[:3], "of", *numbers[3:], "fallback")
    rows = [
        (
            module["name"],
            _shape(module["shape"]),
            module["format"],
            str(module["group_size"]),
            human_figure(module["bits_per_weight"]),
            human_figure(module["relative_error"]),
            module["error_of"] or "",
            human_figure(module["damp"]),
            f"{module['seconds']:.2f} s",
            module["fallback"] or "",
        )
        for module in modules
    ]
    return _table(titles, rows, numbers, words=("fallback",))


def _table(
    titles: Sequence[str],
    rows: Sequence[Sequence[str]],
    numbers: Sequence[str] = (),
    words: Sequence[str | int] = (),
) -> str:
    """An HTML table. Columns, by title or index, of `numbers` are right-aligned, of `words` may wrap."""
    keys = titles or range(len(rows[0]))
    kinds = [" class=number" if key in numbers else " class=words" if key in words else "" for key in keys]
    head = "".join(f"<th{kind}>{escape(title)}</th>" for title, kind in zip(titles, kinds, strict=False))
    body = "\n".join(
        "<tr>" + "".join(f"<td{kind}>{escape(cell)}</td>" for cell, kind in zip(row, kinds, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def _setting(value: Any) -> str:
    if isinstance(value, float):
        return human_figure(value)
    return value if isinstance(value, str) else to_json(value, None)


# ---- the chart ----

_WIDTH, _HEIGHT = 900, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 190, 12, 40


def error_chart(modules: Sequence[dict[str, Any]]) -> str:
    """Relative error over the layers as SVG, one line a kind of module; "" when no layer has a positive
    error.

    Modules that differ by a number alone (experts) are one kind: a point each, the line through their means.
    """
    kinds: dict[str, dict[int, list[tuple[float, str]]]] = defaultdict(lambda: defaultdict(list))
    for module, (layer, rest) in zip(modules, split_names([m["name"] for m in modules]), strict=True):
        error = module.get("relative_error")
        if layer is not None and error and math.isfinite(error) and error > 0:
            kinds[re.sub(r"\b\d+\b", "*", rest)][layer].append((error, module["name"]))
    if not kinds:
        return ""
    layers = sorted({layer for points in kinds.values() for layer in points})
    errors = [error for points in kinds.values() for at in points.values() for error, _ in at]
    curves = {
        kind: _Curve(
            [(layer, sum(error for error, _ in at) / len(at)) for layer, at in sorted(points.items())],
            [(layer, error, name) for layer, at in sorted(points.items()) for error, name in at],
        )
        for kind, points in kinds.items()
    }
    marks = layers[:: math.ceil(len(layers) / 24)]
    return _chart(
        curves, (layers[0], layers[-1]), _axis_limits(min(errors), max(errors)), marks, "layer", "relative error"
    )


def size_chart(curves: dict[str, Sequence[tuple[float, float, str]]], across: str, up: str) -> str:
    """Losses over sizes as SVG, one line a curve of points (size, loss, name); "" without a positive loss. Losses that
    are not positive are no points. across, up: what is on the axes."""
    shown = {
        label: [point for point in points if point[1] > 0 and math.isfinite(point[1])]
        for label, points in curves.items()
    }
    shown = {label: points for label, points in shown.items() if points}
    if not shown:
        return ""
    sizes = [size for points in shown.values() for size, _, _ in points]
    losses = [loss for points in shown.values() for _, loss, _ in points]
    step = (max(sizes) - min(sizes)) / 8 or 1
    unit = 10 ** math.floor(math.log10(step))
    unit *= next(factor for factor in (1, 2, 5, 10) if factor * unit >= step)
    marks = [m * unit for m in range(math.ceil(min(sizes) / unit), math.floor(max(sizes) / unit) + 1)]
    drawn = {label: _Curve([point[:2] for point in points], points) for label, points in shown.items()}
    limits = _axis_limits(min(losses), max(losses))
    return _chart(drawn, (min(sizes), max(sizes)), limits, marks, across, up)


@dataclass(frozen=True)
class _Curve:
    """A line through points (x, y), and dots (x, y, name)."""

    line: Sequence[tuple[float, float]]
    dots: Sequence[tuple[float, float, str]]


def _chart(
    curves: dict[str, _Curve],
    across: tuple[float, float],
    limits: tuple[float, float],
    marks: Sequence[float],
    x_label: str,
    y_label: str,
) -> str:
    """Curves over a linear x with marks and a logarithmic y between limits, and their key."""
    low, high = limits

    def x(value: float) -> float:
        share = (value - across[0]) / (across[1] - across[0]) if across[1] > across[0] else 0.5
        return round(_LEFT + 14 + share * (_WIDTH - _LEFT - _RIGHT - 28), 1)

    def y(value: float) -> float:
        share = (math.log10(value) - math.log10(low)) / (math.log10(high) - math.log10(low))
        return round(_HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM), 1)

    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    # More curves than fit beside the plot: the picture grows downwards with its key.
    height = max(_HEIGHT, _TOP + 20 + 20 * len(curves))
    label = f"{escape(y_label)} by {escape(x_label)}"
    parts = [f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{label}">']
    for tick in _ticks(low, high):
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y(tick)}" y2="{y(tick)}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y(tick) + 4}" text-anchor="end">{tick:g}</text>')
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    for mark in marks:
        parts.append(f'<text x="{x(mark)}" y="{bottom + 18}" text-anchor="middle">{mark:g}</text>')
    parts.append(f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>')
    for index, (kind, curve) in enumerate(curves.items()):
        colour, dash = _COLOURS[index % len(_COLOURS)], _DASHES[index // len(_COLOURS) % len(_DASHES)]
        stroke = f'stroke="{colour}" stroke-width="1.6" stroke-dasharray="{dash}"'
        line = " ".join(f"{x(at)},{y(value)}" for at, value in curve.line)
        parts.append(f'<polyline points="{line}" fill="none" {stroke}/>')
        parts += [
            f'<circle cx="{x(at)}" cy="{y(value)}" r="3" fill="{colour}">'
            f"<title>{escape(name)}: {value:.3g}</title></circle>"
            for at, value, name in curve.dots
        ]
        key = _TOP + 8 + 20 * index
        parts.append(f'<line x1="{right + 16}" x2="{right + 36}" y1="{key}" y2="{key}" {stroke}/>')
        parts.append(f'<text x="{right + 42}" y="{key + 4}">{escape(kind)}</text>')
    return "\n".join(parts) + "\n</svg>"


def _ticks(low: float, high: float) -> list[float]:
    """Multiples of 1, 2 and 5 times powers of ten in [low, high]."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    marks = [float(f"{digit}e{power}") for power in range(first, last + 1) for digit in (1, 2, 5)]
    if last - first > 3:
        marks = [mark for mark in marks if f"{mark:e}".startswith("1")]
    return [mark for mark in marks if low * 0.999 <= mark <= high * 1.001]


def _axis_limits(smallest: float, largest: float) -> tuple[float, float]:
    """The nearest multiples of 1, 2 and 5 times powers of ten that enclose both, never equal."""
    marks = [
        float(f"{digit}e{power}")
        for power in range(math.floor(math.log10(smallest)) - 1, math.ceil(math.log10(largest)) + 2)
        for digit in (1, 2, 5)
    ]
    low = max(mark for mark in marks if mark <= smallest)
    high = min(mark for mark in marks if mark >= largest and mark > low)
    return low, high
