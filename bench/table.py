"""Markdown tables from result files: python bench/table.py RESULT.json ... [--write README.md]

--write puts them between the lines `<!-- bench:begin -->` and `<!-- bench:end -->` of a file, and changes nothing else.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import harness

BEYOND_ALL = 1 << 40  # a threshold that no product reaches
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def grid(header: list[str], lines: list[list[str]]) -> str:
    """A markdown table; the first column is text, the others numbers."""
    if any(len(line) != len(header) for line in lines):
        raise ValueError(f"grid: expected {len(header)} cells in every line")
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *lines])


def origin(contents: dict) -> str:
    machine, settings = contents["machine"], contents["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in contents["versions"].items())
    probe = contents["probe_gbps"]
    count = settings.get("threads")  # sizes have none
    threads = "" if count is None else f", {count} thread{'' if count == 1 else 's'}"
    bandwidth = f", read bandwidth {probe['start']} GB/s at the start and {probe['end']} at the end" if probe else ""
    text = (
        f"{machine['cpu']} (family {machine['family']}, model {machine['model']}){threads}{bandwidth}; {versions}; "
        f"commit {contents['commit'][:12]}{' with changes' if contents['dirty'] else ''}, {contents['date'][:10]}."
    )
    if contents["not_installed"]:
        text += " Not installed, so not measured: " + ", ".join(contents["not_installed"]) + "."
    if contents.get("left_out"):
        subjects = dict.fromkeys(row["subject"] for row in contents["left_out"])
        text += f" Left out for want of time: {len(contents['left_out'])} rows of {', '.join(subjects)}."
    return text


def _cell(row: dict | None, value: str, share: bool) -> str:
    if row is None:
        return ""
    if value not in row:
        return "failed"
    busy = "" if row["quiet"] else "?"
    return f"{row[value]:,.0f}{busy}" + (f" ({row['share']:.2f})" if share else "")


def _subjects(rows: list[dict]) -> list[dict]:
    """One row a subject: ours first, then peers with float activations, then those that quantize them; by bits."""
    first: dict[str, dict] = {}
    for row in rows:
        first.setdefault(row["subject"], row)
    return sorted(first.values(), key=lambda r: (not r["ours"], r["quantizes_activations"], r["bits"]))


def matmul(contents: dict) -> str:
    rows = contents["rows"]
    found = {(r["subject"], r["shape"], r["tokens"], r["case"]): r for r in rows}
    shapes = {r["shape"]: f"{r['cols']}×{r['rows']}" for r in rows}
    parts = []
    if any(r["tokens"] == 1 for r in rows):
        header = [
            "one token, µs (share of bandwidth)",
            *shapes.values(),
            *(["A, in cache", "error"] if "A" in shapes else []),
        ]
        lines = []
        for subject in _subjects(rows):
            name = subject["subject"]
            line = [name] + [_cell(found.get((name, shape, 1, "dram")), "us", True) for shape in shapes]
            if "A" in shapes:
                cold = found.get((name, "A", 1, "dram"), {})
                error = cold.get("error")
                line += [_cell(found.get((name, "A", 1, "warm")), "us", False), "" if error is None else f"{error:.1e}"]
            lines.append(line)
        parts.append(grid(header, lines))
    more = sorted({(r["shape"], r["tokens"]) for r in rows if r["tokens"] > 1})
    if more:
        header = ["more tokens, µs"] + [f"{shapes[shape]}, {tokens}" for shape, tokens in more]
        lines = [
            [s["subject"]] + [_cell(found.get((s["subject"], *column, "dram")), "us", False) for column in more]
            for s in _subjects(rows)
        ]
        parts.append(grid(header, lines))
    return "\n\n".join(parts)


OUTPUTS = {"fresh": "new output", "reused": "same output", "op": "as an operator"}


def gather(contents: dict) -> str:
    """Lookups, then embedding bags where they were measured."""
    rows = [r for r in contents["rows"] if r["ids"]]
    lookups = {(r["subject"], r["ids"], r["case"]): r for r in rows if r["case"] in OUTPUTS}
    columns = sorted({(r["ids"], r["case"]) for r in lookups.values()}, key=lambda c: (list(OUTPUTS).index(c[1]), c[0]))
    header = ["lookups, ns a row"] + [f"{ids} ids, {OUTPUTS[case]}" for ids, case in columns]
    parts = [_by_subject(header, lookups, columns)]
    bags = {(r["subject"], r["rows"], r["cols"], r["ids"], r["bags"]): r for r in rows if r["case"] == "bags"}
    if bags:
        columns = list(dict.fromkeys(key[1:] for key in bags))
        header = ["sums of bags, ns an id (share of bandwidth)"]
        header += [f"{rows}×{cols}, {ids} ids in {count}" for rows, cols, ids, count in columns]
        parts.append(_by_subject(header, bags, columns, share=True))
    return "\n\n".join(parts)


def _by_subject(header: list[str], found: dict[tuple, dict], columns: list[tuple], share: bool = False) -> str:
    """A line a subject, ours first; found: by subject and column."""
    subjects = sorted({(not r["ours"], r["bits"], r["subject"]) for r in found.values()})
    lines = [[name] + [_cell(found.get((name, *c)), "ns_per_row", share) for c in columns] for _, _, name in subjects]
    return grid(header, lines)


def model(contents: dict) -> str:
    rows, settings = contents["rows"], contents["settings"]
    found = {(r["subject"], r["what"], r["tokens"]): r for r in rows}
    columns = list(dict.fromkeys((r["what"], r["tokens"]) for r in rows))
    held = "ternary, embedding int4"
    if "bits" in settings:
        held = f"int{settings['bits']} g128, embedding and head int{settings['head_bits']}"
    header = [
        f"{settings.get('shape', 'llama-1b')}, {settings['layers']} layers, {held}",
        *[f"{what} {tokens}, tokens/s" for what, tokens in columns],
        "resident MB",
        "files MB",
        "load s",
    ]
    lines = []
    for subject in dict.fromkeys(r["subject"] for r in rows):
        line = [subject]
        for column in columns:
            row = found.get((subject, *column), {})
            line.append(f"{row['tokens_per_second']:.1f}{'' if row['quiet'] else '?'}" if "us" in row else "failed")
        sizes = next((r for r in rows if r["subject"] == subject and "us" in r), None)
        if sizes is None:
            line += ["", "", ""]
        else:
            load = sizes.get("load_seconds")
            line += [
                f"{sizes['resident_mb']:,.0f}",
                f"{sizes['disk_bytes'] / 1e6:,.0f}",
                "" if load is None else f"{load:.1f}",
            ]
        lines.append(line)
    return grid(header, lines)


def quality(contents: dict) -> str:
    rows, elsewhere = contents["rows"], contents["settings"]["elsewhere"]
    found = {(r["bits"], r["group_size"], r["variant"]): r for r in rows}
    variants = ["round to nearest", "defaults"]
    header = [f"{contents['settings']['model']}: rise of perplexity from {rows[0]['reference_perplexity']:.3f} (KL)"]
    lines = []
    for bits, group_size in dict.fromkeys((r["bits"], r["group_size"]) for r in rows):
        line = [f"{bits} bits, groups of {group_size}"]
        for variant in variants:
            row = found.get((bits, group_size, variant))
            line.append(f"{row['increase_percent']:+.2f}% ({row['kl_divergence']:.5f})" if row else "")
        lines.append(line + [f"{figures[str(bits)]:+.2f}%" for figures in elsewhere.values()])
    return grid(header + variants + list(elsewhere), lines)


def tied_quality(contents: dict) -> str:
    """One line a size, one column a way; the default's figure is in bold."""
    rows = contents["rows"]
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    found = {(row["bits"], row["group_size"], row["variant"]): row for row in rows}
    header = [
        f"{contents['settings']['model']}, the tied table alone: rise of {rows[0]['reference_perplexity']:.3f} (KL)"
    ]
    lines = []
    for bits, group_size in dict.fromkeys((row["bits"], row["group_size"]) for row in rows):
        line = [f"{bits} bits, groups of {group_size}"]
        for variant in variants:
            row = found[bits, group_size, variant]
            figure = f"{row['increase_percent']:+.2f}% ({row['kl_divergence']:.5f})"
            line.append(f"**{figure}**" if row["default"] else figure)
        lines.append(line)
    return grid(header + variants, lines)


def footprint(contents: dict) -> str:
    header = ["4 bits for everything, one table", "arithmetic", "file", "weights in memory", "process grows by, MB"]
    header += ["opened on demand", "and one layer run"]
    lines = []
    for row in contents["rows"]:
        loaded, steps = row.get("loaded"), row["on demand"]["steps"]
        grown = _grown(loaded["steps"]) if loaded else None
        opened = _grown(steps)
        lines.append(
            [
                row["model"],
                f"{row['arithmetic_bytes']:,}",
                f"{row['file_bytes']:,}",
                f"{loaded['weights']:,}" if loaded else "",
                f"{grown[0]:.0f}" if grown else "",
                f"{opened[0]:.0f}",
                f"{opened[1]:.0f}",
            ]
        )
    return grid(header, lines)


def _grown(steps: dict) -> list[float]:
    """Megabytes (10^6) that a process holds more after each step than before the first."""
    before, *after = (step["resident_mb"] * 1.048576 for step in steps.values())
    return [step - before for step in after]


def ternary_model(contents: dict) -> str:
    header = [
        contents["settings"]["model"],
        "dtype",
        "perplexity",
        "rise",
        "KL",
        "logits",
        "file bytes",
        "ternary to bf16",
    ]
    lines = [
        [
            row["subject"],
            row["dtype"],
            f"{row['perplexity']:.3f}",
            f"{row['increase_percent']:+.4f}%",
            f"{row['kl_divergence']:.1e}",
            f"{row['logits_distance']:.0e}",
            f"{row['file_bytes']:,}",
            f"{row['ternary_ratio']:.4f}" if "ternary_ratio" in row else "",
        ]
        for row in contents["rows"]
    ]
    return grid(header, lines)


def ternary_quality(contents: dict) -> str:
    """Ways of ternarizing down the side, what is ternary across: perplexity and KL divergence."""
    rows = [r for r in contents["rows"] if r["ternary"] in ("attention", "MLP", "both")]
    found = {(r["way"], r["group_size"], r["ternary"]): r for r in rows}
    parts = list(dict.fromkeys(r["ternary"] for r in rows))
    header = [f"{contents['settings']['model']}: perplexity {rows[0]['reference_perplexity']:.2f} (KL) with ternary"]
    lines = []
    for way, group_size in dict.fromkeys((r["way"], r["group_size"]) for r in rows):
        line = [f"{way}, {'one scale a matrix' if group_size == -1 else f'groups of {group_size}'}"]
        for part in parts:
            row = found.get((way, group_size, part))
            line.append(f"{row['perplexity']:.2f} ({row['kl_divergence']:.3f})" if row else "")
        lines.append(line)
    return grid(header + parts, lines)


def instructions(contents: dict) -> str:
    """Kernels down the side, levels across: instructions a line of codes, or for 64 values where none are read."""
    rows = contents["rows"]
    levels = list(dict.fromkeys(row["isa"] for row in rows))
    found = {(row["kernel"], row["case"], row["isa"]): row for row in rows}
    lines = []
    for kernel, case in dict.fromkeys((row["kernel"], row["case"]) for row in rows):
        line = [f"{kernel} {case}".strip()]
        for level in levels:
            row = found.get((kernel, case, level))
            line.append(f"{row['per_line'] if 'per_line' in row else row['per_64_values']:,.1f}" if row else "")
        lines.append(line)
    return grid(["instructions a line (where no codes are read: 64 values)", *levels], lines)


def blocking(contents: dict) -> str:
    """A line for each format and threshold: the best measured and lowbit's own, and how much longer each takes than the
    better way of every point."""
    header = ["threshold", "format", "best", "longer by", "lowbit's own", "longer by"]
    units = {"tiles": ("as tiles of 16 from … tokens", 1), "own digits": ("rows read digits alone up to … bytes", 0)}
    lines = []
    for row in contents["rows"]:
        name, first = units[row["threshold"]]
        line = [name, row["format"]]
        for which in ("best", "own"):
            place = "any" if row[which] >= BEYOND_ALL else f"{row[which] + first:,}"
            line += [place, f"{row[which + '_excess']:.1%}"]
        lines.append(line)
    return grid(header, lines)


TABLES = {
    "matmul": matmul,
    "gather": gather,
    "model": model,
    "model_ternary": model,
    "quality": quality,
    "tied_quality": tied_quality,
    "footprint": footprint,
    "ternary_model": ternary_model,
    "ternary_quality": ternary_quality,
    "instructions": instructions,
    "blocking": blocking,
}


def markdown(documents: list[dict]) -> str:
    """Every document's table, followed by where it comes from; `?` marks rows that others disturbed."""
    parts = []
    for contents in documents:
        if contents["bench"] not in TABLES:
            raise ValueError(f"bench: expected one of {', '.join(TABLES)}, got {contents['bench']}")
        parts += [TABLES[contents["bench"]](contents), f"<sub>{origin(contents)}</sub>"]
    return "\n\n".join(parts)


def replace_between(text: str, new: str) -> str:
    """`text` with `new` between the markers. Raises ValueError unless each marker stands there once, in order."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"expected one {BEGIN} and one {END} after it")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{new}\n{END}{rest.split(END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("results", nargs="+")
    parser.add_argument("--write", metavar="FILE", help="put the tables between this file's markers")
    options = parser.parse_args()
    tables = markdown([harness.load(path) for path in options.results])
    if options.write:
        path = Path(options.write)
        path.write_text(replace_between(path.read_text(), tables))
    else:
        print(tables)


if __name__ == "__main__":
    main()
