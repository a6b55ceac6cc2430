"""Two result files of one benchmark, row by row: python bench/compare.py BEFORE.json AFTER.json [--fail-above 1.1]

Prints time before, after and their quotient (above 1: slower now), the worst last, where a terminal ends. Times drift
with the machine: where memory bounds a row (share of the probed bandwidth above half), the shares are compared as well,
and it counts as slower only if both say so. Rows that were measured on a busy machine are marked with "?".

--fail-above R: status 1 if a row that is not marked takes more than R times as long, or fails where it used to be
measured. Status 2: files that cannot be compared.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import dataclass

import harness

KEYS = ("subject", "shape", "tokens", "case", "ids", "bags", "what")
BAG_KEYS = ("rows", "cols")  # bags are summed from tables of several sizes; older files leave the only size out
MEMORY_BOUND = 0.5


@dataclass(frozen=True)
class Pair:
    """One row in both files."""

    key: tuple
    before: dict
    after: dict

    @property
    def ratio(self) -> float:
        """Time after / before."""
        return self.after["us"] / self.before["us"]

    @property
    def slowdown(self) -> float:
        """ratio; where memory bounds the row, the quotient of the shares if that is less: slower memory is no slower
        kernel."""
        shares = self.before.get("share"), self.after.get("share")
        if None in shares or max(shares) <= MEMORY_BOUND:
            return self.ratio
        return min(self.ratio, shares[0] / shares[1])

    @property
    def noisy(self) -> bool:
        return not (self.before.get("quiet", True) and self.after.get("quiet", True))


def key(row: dict) -> tuple:
    keys = KEYS + BAG_KEYS if row.get("case") == "bags" else KEYS
    return tuple(row.get(name) for name in keys)


def name(row_key: tuple) -> str:
    return " ".join(str(part) for part in row_key if part is not None)


def compare(before: dict, after: dict) -> tuple[list[Pair], list[str], list[str]]:
    """(rows of both, the slowest now last; rows measured before that fail now; remarks about rows of one file only).

    ValueError: files of two benchmarks, with two numbers of threads, with one row twice, or without a common row.
    """
    if before["bench"] != after["bench"]:
        raise ValueError(f"bench: expected two files of one benchmark, got {before['bench']} and {after['bench']}")
    threads = [contents["settings"].get("threads") for contents in (before, after)]
    if threads[0] != threads[1]:
        raise ValueError(f"threads: expected the same in both files, got {threads[0]} and {threads[1]}")
    old, new = measured(before), measured(after)
    pairs = [Pair(k, old[k], new[k]) for k in new if k in old]
    if not pairs:
        raise ValueError("rows: expected measured rows that both files have, got none")
    failures = {key(row): row["failure"] for row in after["rows"] if "failure" in row}
    left_out = {key(row): row["left_out"] for row in after.get("left_out", [])}
    broken = [f"{name(k)}: {failures[k]}" for k in old if k in failures]
    gone = [k for k in old if k not in new and k not in failures]
    remarks = [f"only before: {name(k)}" + (f" ({left_out[k]})" if k in left_out else "") for k in gone]
    remarks += [f"only after: {name(k)}" for k in new if k not in old]
    return sorted(pairs, key=lambda pair: pair.slowdown), broken, remarks


def measured(contents: dict) -> dict[tuple, dict]:
    rows: dict[tuple, dict] = {}
    for row in contents["rows"]:
        if "us" in row and rows.setdefault(key(row), row) is not row:
            raise ValueError(f"rows: expected each once, got two of {name(key(row))}")
    return rows


def line(pair: Pair, width: int) -> str:
    shares = ""
    if "share" in pair.before and "share" in pair.after:
        shares = f"   share {pair.before['share']:.2f} -> {pair.after['share']:.2f}"
    marks = ["?"] * pair.noisy + [f"x{pair.slowdown:.2f} by shares"] * (pair.slowdown != pair.ratio)
    return (
        f"{name(pair.key):<{width}} {pair.before['us']:>10.1f} -> {pair.after['us']:>10.1f} us  x{pair.ratio:.2f}"
        f"{shares}  {', '.join(marks)}"
    ).rstrip()


def slower_than(pairs: list[Pair], limit: float) -> list[Pair]:
    """Those to be taken seriously: beyond the limit, and measured on a quiet machine both times."""
    return [pair for pair in pairs if pair.slowdown > limit and not pair.noisy]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("before")
    parser.add_argument("after")
    parser.add_argument(
        "--fail-above", type=float, metavar="R", help="status 1 if a row takes more than R times as long"
    )
    options = parser.parse_args()
    if options.fail_above is not None and options.fail_above < 1:
        parser.error(f"--fail-above: expected at least 1, got {options.fail_above}")
    try:
        before, after = harness.load(options.before), harness.load(options.after)
        pairs, broken, remarks = compare(before, after)
    except (ValueError, OSError) as failure:
        parser.error(str(failure))
    for label, contents in (("before", before), ("after", after)):
        changed = " with changes" if contents["dirty"] else ""
        print(f"{label}: {contents['commit'][:12]}{changed} {contents['date']} {contents['machine']['cpu']}")
    if before["machine"] != after["machine"]:
        print("the machines differ")
    width = max(len(name(pair.key)) for pair in pairs)
    print(*remarks, *(line(pair, width) for pair in pairs), sep="\n")
    noisy = sum(pair.noisy for pair in pairs)
    marked = f", {noisy} marked ? (the machine was busy)" if noisy else ""
    print(f"{len(pairs)} rows, median x{statistics.median(pair.ratio for pair in pairs):.2f}{marked}")
    print(*(f"fails now: {text}" for text in broken), sep="\n", end="\n" if broken else "")
    if options.fail_above is None:
        return
    slower = slower_than(pairs, options.fail_above)
    unsure = sum(pair.slowdown > options.fail_above and pair.noisy for pair in pairs)
    print(f"{len(slower)} rows slower than x{options.fail_above:g}" + (f", and {unsure} marked ?" if unsure else ""))
    sys.exit(1 if slower or broken else 0)


if __name__ == "__main__":
    main()
