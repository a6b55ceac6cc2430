"""Two result files of the same benchmark, row by row: python bench/compare.py BEFORE.json AFTER.json

Prints time before, after and their quotient (above 1: faster now). Absolute times drift with the machine, so where
memory bounds a row look at the shares of the probed bandwidth, which stand beside them.
"""

from __future__ import annotations

import argparse
import statistics

import harness

KEYS = ("subject", "shape", "tokens", "case", "ids", "what")


def key(row: dict) -> tuple:
    return tuple(row.get(name) for name in KEYS)


def compare(before: dict, after: dict) -> tuple[list[tuple], list[str]]:
    """([(key, row before, row after, speed-up)], rows of one file only). ValueError: files of two benchmarks."""
    if before["bench"] != after["bench"]:
        raise ValueError(f"bench: expected two files of one benchmark, got {before['bench']} and {after['bench']}")
    old = {key(row): row for row in before["rows"] if "us" in row}
    new = {key(row): row for row in after["rows"] if "us" in row}
    pairs = [(k, old[k], new[k], old[k]["us"] / new[k]["us"]) for k in new if k in old]
    lonely = [f"only before: {name(k)}" for k in old if k not in new] + [
        f"only after: {name(k)}" for k in new if k not in old
    ]
    return pairs, lonely


def name(row_key: tuple) -> str:
    return " ".join(str(part) for part in row_key if part is not None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("before")
    parser.add_argument("after")
    options = parser.parse_args()
    before, after = harness.load(options.before), harness.load(options.after)
    for label, contents in (("before", before), ("after", after)):
        print(f"{label}: {contents['commit'][:12]} {contents['date']} {contents['machine']['cpu']}")
    if before["machine"] != after["machine"]:
        print("the machines differ")
    pairs, lonely = compare(before, after)
    for row_key, old, new, speedup in sorted(pairs, key=lambda pair: pair[3]):
        print(
            f"{name(row_key):<64} {old['us']:>10.1f} -> {new['us']:>10.1f} us  x{speedup:.2f}"
            f"   share {old['share']:.2f} -> {new['share']:.2f}"
        )
    if pairs:
        print(f"{len(pairs)} rows, median x{statistics.median(pair[3] for pair in pairs):.2f}")
    for line in lonely:
        print(line)


if __name__ == "__main__":
    main()
