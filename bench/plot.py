"""Figures of result files: python bench/plot.py RESULT.json|FOLDER ... -o FOLDER   (needs matplotlib)

For each matmul result  <stem>_roofline   every kernel row under this machine's two roofs
                        <stem>_time       microseconds by tokens, format and activation mode
                        <stem>_peers_1_token, <stem>_peers_16_tokens   speed against each peer
for each gather result  <stem>_lookups    nanoseconds a row, ours and the peers'
                        <stem>_bags       the same for sums of bags, where they were measured

each as SVG and PNG, without a display. Of a folder, the results of other benchmarks are passed over; a file that is
named must be one of these two. Colours are those of Okabe and Ito, and no difference is told by colour alone.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import harness

try:
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
except ModuleNotFoundError as missing:
    sys.exit(f"plots need matplotlib (pip install 'matplotlib>=3.8', the extra named plot): {missing}")

FORMATS = {  # colour and marker
    "trit": ("#D55E00", "v"),
    "ternary as int2": ("#56B4E9", "<"),
    "int2": ("#E69F00", "s"),
    "int3": ("#009E73", "D"),
    "int4": ("#0072B2", "o"),
    "int8": ("#CC79A7", "^"),
}
INK, MUTED, GRID = "#222222", "#6B6B6B", "#DDDDDD"
FASTER, SLOWER = "#0072B2", "#D55E00"
MODES = {False: "float", True: "int8"}
OUTPUTS = {"fresh": "new output", "reused": "same output", "op": "as an operator"}
STYLE = {
    "font.size": 9,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text: it can be searched, and a figure is the same wherever it is drawn
    "svg.hashsalt": "lowbit",
}


# ---- what is in a result file ----


def format_of(row: dict) -> str:
    """The format of a row of ours, as FORMATS names it."""
    if row.get("ternary"):
        return "trit" if "trit" in row["subject"] else "ternary as int2"
    return f"int{row['bits']:g}"


def products(contents: dict) -> list[dict]:
    """The measured products of the shape that has most of them: figures show one shape."""
    measured = [row for row in contents["rows"] if "us" in row]
    if not measured:
        raise ValueError("rows: expected at least one measured product, got none")
    shapes = [row["shape"] for row in measured]
    shape = max(dict.fromkeys(shapes), key=shapes.count)
    return [row for row in measured if row["shape"] == shape]


def operations(row: dict) -> float:
    """Multiplications and additions of a product."""
    return 2.0 * row["rows"] * row["cols"] * row["tokens"]


def counterpart(peer: dict, rows: list[dict]) -> dict | None:
    """The row of ours that a peer is compared with: the same product with the same weights (ternary; or so many bits; 4
    for a peer whose weights are dense) and as good activations, the fastest where there are several."""
    bits = 4 if peer["bits"] >= 16 else peer["bits"]
    alike = [
        row
        for row in rows
        if row["ours"]
        and row["tokens"] == peer["tokens"]
        and row["case"] == peer["case"]
        and row["quantizes_activations"] == peer["quantizes_activations"]
        and bool(row.get("ternary")) == bool(peer.get("ternary"))
        and (peer.get("ternary") or row["bits"] == bits)
    ]
    return min(alike, key=lambda row: row["us"]) if alike else None


def ratios(contents: dict, tokens: int) -> list[tuple[dict, dict, float]]:
    """(peer, ours, how many times as fast ours is) from DRAM, the peers that are furthest behind last."""
    rows = [r for r in products(contents) if r["tokens"] == tokens and r["case"] == "dram"]
    pairs = [(peer, counterpart(peer, rows)) for peer in rows if not peer["ours"]]
    found = [(peer, ours, peer["us"] / ours["us"]) for peer, ours in pairs if ours]
    return sorted(found, key=lambda pair: pair[2])


# ---- figures ----


def sheet(contents: dict, title: str, size: tuple[float, float], panels: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty figure that says what was measured, where and when."""
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    machine, threads = contents["machine"], contents["settings"]["threads"]
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
    where = (
        f"{machine['cpu']} (family {machine['family']}, model {machine['model']}), "
        f"{threads} thread{'' if threads == 1 else 's'}; commit {contents['commit'][:12]}"
        f"{' with changes' if contents['dirty'] else ''}, {contents['date'][:10]}"
    )
    figure.supxlabel(where, x=0.01, ha="left", fontsize=8, color=MUTED)
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def plain(axis, steps: tuple[int, ...] = (1, 2, 5), only: list[int] | None = None) -> None:
    """A logarithmic axis labelled 1, 2, 5, 10 and not by powers of ten; with `only`, at those values."""
    axis.set_major_locator(LogLocator(subs=steps))
    if only:
        axis.set_ticks(only)
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.12g}"))
    axis.set_minor_formatter(NullFormatter())


def roofline(contents: dict) -> Figure:
    """Operations a second against operations a byte of weights; roofs: the probed bandwidth, the multiply rates."""
    rows = [row for row in products(contents) if row["ours"]]
    if not rows:
        raise ValueError("rows: expected products of lowbit's, got none")
    bandwidth = statistics.median(row["probe_gbps"] for row in rows)
    figure, (axes,) = sheet(contents, f"Roofline: {rows[0]['cols']}×{rows[0]['rows']}, every kernel row", (10, 6))
    points = [(operations(r) / r["bytes"], operations(r) / r["us"] * 1e-3, r) for r in rows]
    left, right = min(p[0] for p in points) / 2, max(p[0] for p in points) * 2
    _roofs(axes, bandwidth, contents.get("multiply_gops") or {}, left, right)
    for intensity, rate, row in points:
        colour, marker = FORMATS[format_of(row)]
        cold = row["case"] == "dram"
        mode = MODES[row["quantizes_activations"]]
        axes.plot(
            intensity,
            rate,
            marker=marker,
            markersize=8 if mode == "int8" else 6,
            color=colour,
            markerfacecolor=colour if cold else "white",
            alpha=1.0 if row["quiet"] else 0.4,
            linestyle="none",
            gid=f"{format_of(row)}, {mode}, {row['tokens']} tokens, {row['case']}",
        )
    axes.set(xscale="log", yscale="log", xlim=(left, right))
    axes.set_xlabel("operations a byte of weights read")
    axes.set_ylabel("10⁹ operations a second")
    plain(axes.xaxis)
    plain(axes.yaxis, (1,))
    _token_labels(axes, points)
    shown = [name for name in FORMATS if name in {format_of(row) for row in rows}]
    handles = [_key(name, *FORMATS[name]) for name in shown]
    handles += [
        _key("large: int8 mode, small: float", MUTED, "o"),
        _key("filled: from DRAM", MUTED, "o"),
    ]
    handles += [_key("hollow: in cache", MUTED, "o", "white"), _key("pale: busy machine", "#BBBBBB", "o")]
    handles.append(Line2D([], [], linestyle="none", label="numbers: tokens"))
    figure.legend(handles=handles, loc="outside right upper", fontsize=8)
    return figure


def _token_labels(axes: Axes, points: list[tuple[float, float, dict]]) -> None:
    """The tokens of a product above the fastest of each format: a point to the right is more of them, or fewer bits."""
    best: dict[tuple[str, int], tuple[float, float]] = {}
    for intensity, rate, row in points:
        key = format_of(row), row["tokens"]
        if rate > best.get(key, (0, 0))[1]:
            best[key] = intensity, rate
    for (_, tokens), place in best.items():
        look = {"ha": "center", "color": MUTED, "fontsize": 7}
        axes.annotate(str(tokens), place, xytext=(0, 6), textcoords="offset points", **look)


def _key(label: str, colour: str, marker: str, face: str | None = None) -> Line2D:
    return Line2D([], [], color=colour, marker=marker, markerfacecolor=face or colour, linestyle="none", label=label)


def _roofs(axes: Axes, bandwidth: float, rates: dict[str, float], left: float, right: float) -> None:
    top = max(rates.values(), default=bandwidth * right)
    edge = min(right, top / bandwidth)
    axes.plot([left, edge], [bandwidth * left, bandwidth * edge], color=INK, linewidth=1.5, gid="read bandwidth")
    middle = (left * edge) ** 0.5
    axes.annotate(
        f"{bandwidth:.0f} GB/s read",
        (middle, bandwidth * middle),
        xytext=(0, 6),
        textcoords="offset points",
        ha="right",
        color=INK,
    )
    # Float mode multiplies two int8 digits of every activation: its roof is half of int8's.
    roofs = {f"{kind} {rate:,.0f}": (kind, rate) for kind, rate in rates.items()}
    if "int8" in rates:
        roofs[f"int8, two digits (float mode) {rates['int8'] / 2:,.0f}"] = ("float mode", rates["int8"] / 2)
    for label, (kind, rate) in roofs.items():
        style = "-" if kind == "int8" else "--"
        start = max(left, rate / bandwidth)
        axes.plot(
            [start, max(right, start)], [rate, rate], color=INK, linewidth=1.2, linestyle=style, gid=f"{kind} peak"
        )
        axes.annotate(
            label,
            (right, rate),
            xytext=(-2, -10 if kind == "float mode" else 3),  # close to bf16's, which lies about as high
            textcoords="offset points",
            ha="right",
            color=INK,
            fontsize=8,
        )
    if not rates:
        axes.annotate(
            "multiply rate: not measured in this file", (0.99, 0.02), xycoords="axes fraction", ha="right", color=MUTED
        )


def time(contents: dict) -> Figure:
    """Microseconds of a product by its tokens; a panel an activation mode."""
    rows = [row for row in products(contents) if row["ours"]]
    if not rows:
        raise ValueError("rows: expected products of lowbit's, got none")
    title = f"Time of a product: {rows[0]['cols']}×{rows[0]['rows']}"
    figure, panels = sheet(contents, title, (11, 5), panels=2)
    tokens = sorted({row["tokens"] for row in rows})
    for axes, (quantizes, mode) in zip(panels, MODES.items(), strict=True):
        for name, (colour, marker) in FORMATS.items():
            for case, line in (("dram", "-"), ("warm", ":")):
                series = sorted(
                    (r["tokens"], r["us"])
                    for r in rows
                    if r["quantizes_activations"] == quantizes and format_of(r) == name and r["case"] == case
                )
                if series:
                    x, y = zip(*series, strict=True)
                    axes.plot(x, y, line, color=colour, marker=marker, markersize=5, gid=f"{name}, {mode}, {case}")
        axes.set(xscale="log", yscale="log", title=f"{mode} activations", xlabel="tokens")
        axes.set_ylim(min(r["us"] for r in rows) / 1.3, max(r["us"] for r in rows) * 1.3)
        plain(axes.xaxis, only=tokens)
        plain(axes.yaxis)
    panels[0].set_ylabel("µs")
    shown = [name for name in FORMATS if name in {format_of(row) for row in rows}]
    handles = [_key(name, *FORMATS[name]) for name in shown]
    lines = (("-", "from DRAM"), (":", "in cache"))
    handles += [Line2D([], [], color=MUTED, linestyle=line, label=label) for line, label in lines]
    figure.legend(handles=handles, loc="outside right upper", fontsize=8)
    return figure


def peers(contents: dict, tokens: int) -> Figure:
    """How many times as fast as each peer, bars from 1; paler where one of the two rows is marked busy."""
    found = ratios(contents, tokens)
    if not found:
        raise ValueError(f"rows: expected a peer beside lowbit with {tokens} tokens, got none")
    first = found[0][0]
    count = f"{tokens} token{'' if tokens == 1 else 's'}"
    title = f"lowbit against each peer: {count}, {first['cols']}×{first['rows']} from DRAM"
    figure, (axes,) = sheet(contents, title, (10, 1.6 + 0.3 * len(found)))
    for place, (peer, ours, ratio) in enumerate(found):
        quiet = peer["quiet"] and ours["quiet"]
        axes.barh(
            place,
            ratio - 1,
            left=1,
            height=0.7,
            color=FASTER if ratio >= 1 else SLOWER,
            alpha=1.0 if quiet else 0.4,
            gid=f"{peer['subject']}, {tokens} tokens",
        )
        mark = f"{ratio:.2f}×" + ("" if quiet else " ?")
        axes.annotate(
            mark,
            (ratio, place),
            xytext=(4 if ratio >= 1 else -4, 0),
            textcoords="offset points",
            va="center",
            ha="left" if ratio >= 1 else "right",
            color=INK,
            fontsize=8,
        )
    axes.set_yticks(
        range(len(found)), [f"{peer['subject']}   /   {ours['subject']}" for peer, ours, _ in found], fontsize=8
    )
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_xscale("log")
    least, most = min(f[2] for f in found), max(f[2] for f in found)
    axes.set_xlim(min(least, 1) / 1.35, max(most, 1) * 1.35)
    axes.set_ylim(-0.7, len(found) - 0.3)
    axes.grid(axis="y", visible=False)
    plain(axes.xaxis)
    axes.set_xlabel("time of the peer / time of lowbit (right of 1: lowbit is faster; ?: the machine was busy)")
    return figure


def lookups(contents: dict) -> Figure:
    """Nanoseconds a row by subject; a panel a number of ids."""
    rows = [row for row in contents["rows"] if "us" in row and row["case"] in OUTPUTS]
    columns = []
    for ids in sorted({row["ids"] for row in rows}):
        held = [row for row in rows if row["ids"] == ids]
        columns.append((f"{ids:,} id{'' if ids == 1 else 's'}", held))
    table = "×".join(f"{size:,}" for size in contents["settings"]["table"])
    return _dots(contents, f"Lookups of random ids: {table}", "ns a row", columns)


def bags(contents: dict) -> Figure:
    """Nanoseconds an id by subject; a panel a table and number of bags."""
    rows = [row for row in contents["rows"] if "us" in row and row["case"] == "bags"]
    columns = []
    for size in dict.fromkeys((row["rows"], row["cols"], row["bags"]) for row in rows):
        held = [row for row in rows if (row["rows"], row["cols"], row["bags"]) == size]
        columns.append((f"{size[0]:,}×{size[1]:,},\n{held[0]['ids']:,} ids in {size[2]} bags", held))
    return _dots(contents, "Sums of bags of random ids", "ns an id", columns)


def _dots(contents: dict, title: str, unit: str, columns: list[tuple[str, list[dict]]]) -> Figure:
    """A line a subject, ours above; a panel a column: (title, its rows)."""
    rows = [row for _, held in columns for row in held]
    if not rows:
        raise ValueError("rows: expected at least one measured lookup, got none")
    names = sorted({(not r["ours"], r["bits"], r["subject"]) for r in rows}, reverse=True)
    places = {name: place for place, (_, _, name) in enumerate(names)}
    size = max(8, 2.2 + 2.4 * len(columns)), 2.0 + 0.28 * len(names)
    figure, panels = sheet(contents, title, size, len(columns))
    style = {"fresh": ("o", FASTER, FASTER), "reused": ("o", FASTER, "white"), "op": ("D", SLOWER, SLOWER)}
    for axes, (heading, held) in zip(panels, columns, strict=True):
        for row in held:
            marker, colour, face = style.get(row["case"], style["fresh"])
            axes.plot(
                row["ns_per_row"],
                places[row["subject"]],
                marker=marker,
                color=colour,
                markerfacecolor=face,
                alpha=1.0 if row["quiet"] else 0.4,
                linestyle="none",
                gid=f"{row['subject']}, {row['ids']} ids, {row['case']}",
            )
        least, most = min(r["ns_per_row"] for r in held), max(r["ns_per_row"] for r in held)
        axes.set(xscale="log", xlabel=unit, xlim=(least / 1.6, most * 1.6), ylim=(-0.6, len(names) - 0.4))
        axes.set_title(heading, fontsize=9)
        axes.set_yticks(range(len(names)), [name for _, _, name in names] if axes is panels[0] else [], fontsize=8)
        plain(axes.xaxis)
    shown = {row["case"] for row in rows}
    handles = [_key(OUTPUTS[case], *kind[1::-1], kind[2]) for case, kind in style.items() if case in shown]
    handles.append(_key("pale: busy machine", "#BBBBBB", "o"))
    figure.legend(handles=handles, fontsize=8, loc="outside right upper")
    return figure


# ---- files ----


def figures(contents: dict) -> dict[str, Callable[[], Figure]]:
    """What a result file has figures for, by the end of their names. ValueError: a benchmark without any."""
    if contents["bench"] == "gather":
        found: dict[str, Callable[[], Figure]] = {"lookups": lambda: lookups(contents)}
        if any(row["case"] == "bags" and "us" in row for row in contents["rows"]):
            found["bags"] = lambda: bags(contents)
        return found
    if contents["bench"] != "matmul":
        raise ValueError(f"bench: expected matmul or gather, got {contents['bench']}")
    found = {"roofline": lambda: roofline(contents), "time": lambda: time(contents)}
    for tokens, name in ((1, "peers_1_token"), (16, "peers_16_tokens")):
        if ratios(contents, tokens):
            found[name] = lambda tokens=tokens: peers(contents, tokens)
    return found


def read(paths: list[str]) -> dict[str, dict]:
    """Result files by stem. Raises ValueError for a file without figures, a folder without results, and results of two
    machines: a figure compares nothing across them."""
    found: dict[str, dict] = {}
    for path in map(Path, paths):
        files = sorted(path.glob("*.json")) if path.is_dir() else [path]
        loaded = {file: harness.load(file) for file in files}
        if path.is_dir():
            loaded = {file: made for file, made in loaded.items() if made["bench"] in ("matmul", "gather")}
        if not loaded:
            raise ValueError(f"{path}: expected results of matmul or gather, found none")
        for file, contents in loaded.items():
            if file.stem in found:
                raise ValueError(f"{file}: expected files of different names, got two {file.stem}")
            found[file.stem] = contents
    machines = {harness.machine_name(contents["machine"]) for contents in found.values()}
    if len(machines) > 1:
        raise ValueError(f"machine: expected one in all files, got {', '.join(sorted(machines))}")
    return found


def draw(paths: list[str], folder: str | Path) -> list[Path]:
    """Writes the figures of result files; returns what it wrote."""
    written = []
    with rc_context(STYLE):
        made = {
            f"{stem}_{name}": figure()
            for stem, contents in read(paths).items()
            for name, figure in figures(contents).items()
        }
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, figure in made.items():
            for ending, settings in (("svg", {"metadata": {"Date": None}}), ("png", {"dpi": 160})):
                written.append(Path(folder) / f"{name}.{ending}")
                figure.savefig(written[-1], facecolor="white", **settings)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("results", nargs="+", help="files, or folders of them")
    parser.add_argument("-o", "--output", metavar="FOLDER", required=True)
    options = parser.parse_args()
    try:
        written = draw(options.results, options.output)
    except (ValueError, OSError) as failure:
        parser.error(str(failure))
    print("\n".join(map(str, written)))


if __name__ == "__main__":
    main()
