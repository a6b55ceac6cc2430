"""Ours and every installed peer in one go: python bench/run.py [--python PEERS] [--minutes 15], or --full.

Without --full: products of shape A (1 to 512 tokens, DRAM and warm) and lookups and bags, in every format, with all the
threads and with one. The time given is divided among these; rounds are what fits (bench/budget.py), what matters most
comes first, and what there was no time for is listed at the end. Writes results/<machine>/matmul_2_threads.json and so
on, and prints the tables.

--full: the benchmarks behind the README's tables, one after the other, about 40 minutes on two cores, of which
ternary_quality takes most. Writes results/<machine>/*.json and, with --write, the README's tables from them.
"""

from __future__ import annotations

import argparse
import collections
import os
import subprocess
import sys
import time
from pathlib import Path

import harness
from budget import Budget

BENCHES = {  # results of --full: (script and what it is given, the option that names the file)
    "matmul": (["matmul.py", "--shapes", "A", "B", "C", "--tokens", "1", "16"], "--output"),
    "gather": (["gather.py"], "--output"),
    "model": (["model.py"], "--output"),
    "model_ternary": (["model.py", "--shape", "ternary-2.7b"], "--output"),
    "quality": (["quality.py"], "--json"),
    "tied_quality": (["tied_quality.py"], "--json"),
    "ternary_quality": (["ternary_quality.py"], "--json"),
    "footprint": (["footprint.py"], "--output"),
}
WITH_PEERS = ("matmul", "gather")
WEIGHTS = {"matmul": 2.5, "gather": 1.0}  # of the time that a run within minutes gives to them
ONE_THREAD = 1.3  # what one thread needs beside all of them: products of many tokens take longer
RESERVE_SECONDS = 30.0  # for what no budget sees: the last turn, interpreters, tables
ROTATE_MEGABYTES = 250  # and at least CACHES_TO_ROTATE times the last-level cache
CACHES_TO_ROTATE = 4


class Stage:
    """One script with one number of threads, writing one file."""

    def __init__(self, bench: str, threads: int, all_threads: bool, megabytes: int):
        self.bench, self.threads = bench, threads
        self.file = f"{bench}_{threads}_thread{'s' if threads > 1 else ''}.json"
        self.weight = WEIGHTS[bench] * (1.0 if all_threads else ONE_THREAD)
        self.given = [f"{bench}.py", "--threads", str(threads)]
        if bench == "matmul":
            # An error does not depend on the threads, and many tokens in float64 would take the time of the timings.
            errors = ["1", "16"] if all_threads else []
            self.given += ["--shapes", "A", "--megabytes", str(megabytes), "--error-tokens", *errors]


def stages(cpus: int, last_level_cache_bytes: int) -> list[Stage]:
    """What a run within minutes consists of: all threads before one, products before lookups."""
    megabytes = max(ROTATE_MEGABYTES, -(-CACHES_TO_ROTATE * last_level_cache_bytes // 1_000_000))
    counts = list(dict.fromkeys((cpus, 1)))
    return [Stage(bench, n, n == cpus, megabytes) for n in counts for bench in WITH_PEERS]


def last_level_cache(machine: dict) -> int:
    """Bytes; 0 where the system does not tell."""
    sizes = [value for _, value in sorted(machine["caches"].items()) if value.endswith("K")]
    return int(sizes[-1][:-1]) * 1024 if sizes else 0


def left_out_lines(contents: dict) -> list[str]:
    """A line for each subject that there was no time for, wholly or in part."""
    missing = collections.defaultdict(list)
    for row in contents.get("left_out", []):
        cell = f"{row['tokens']} tokens {row['case']}" if "tokens" in row else f"{row['ids']} ids {row['case']}"
        missing[row["subject"]].append(cell)
    where = f"{contents['bench']}, {contents['settings']['threads']} thread(s)"
    return [f"{where}: no time for {subject}: {', '.join(cells)}" for subject, cells in missing.items()]


def within_minutes(options: argparse.Namespace, environment: dict[str, str]) -> list[str]:
    """Runs the stages; returns the files they wrote."""
    started, machine = time.monotonic(), harness.machine()
    budget = Budget(max(60 * options.minutes - RESERVE_SECONDS, 1.0))
    planned, written = stages(machine["cpus"], last_level_cache(machine)), []
    folder = Path(options.output) if options.output else harness.RESULTS / harness.machine_name(machine)
    for stage, part in zip(planned, budget.parts([stage.weight for stage in planned]), strict=True):
        output = str(folder / stage.file)
        print(f"== {stage.file}: {part.left():.0f} s", flush=True)
        extra = ["--seconds", f"{max(part.left(), 1.0):.0f}", "--python", options.python, "--output", output]
        run_script([*stage.given, *extra], environment)
        written.append(output)
    lines = [line for path in written for line in left_out_lines(harness.load(path))]
    print("\n".join(lines or ["nothing was left out"]))
    print(f"{(time.monotonic() - started) / 60:.1f} minutes")
    return written


def in_full(options: argparse.Namespace, environment: dict[str, str]) -> list[str]:
    """Runs the benches of --full; returns the files they wrote."""
    folder = Path(options.output) if options.output else harness.RESULTS / harness.machine_name(harness.machine())
    results = []
    for bench in options.only or BENCHES:
        (script, *given), option = BENCHES[bench]
        output = str(folder / f"{bench}.json")
        peers = ["--python", options.python] if bench in WITH_PEERS else []
        run_script([script, *given, option, output, *peers], environment)
        results.append(output)
    return results


def run_script(words: list[str], environment: dict[str, str]) -> None:
    subprocess.run([sys.executable, str(harness.ROOT / "bench" / words[0]), *words[1:]], check=True, env=environment)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="interpreter of the peers' environment")
    parser.add_argument("--minutes", type=float, default=15.0, help="for everything; default 15")
    parser.add_argument("--output", metavar="FOLDER", help="default: results/<machine>")
    parser.add_argument("--full", action="store_true", help="everything in the README's tables, without a limit")
    parser.add_argument("--only", nargs="+", choices=BENCHES, help="of --full")
    parser.add_argument("--write", metavar="FILE", help="with --full: put the tables between this file's markers")
    options = parser.parse_args()
    if (options.write or options.only) and not options.full:
        parser.error("--only and --write: expected --full beside them; a run within minutes has other rows")
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(harness.ROOT / "python"), os.environ.get("PYTHONPATH")])
    )
    results = (in_full if options.full else within_minutes)(options, environment)
    run_script(["table.py", *results, *(["--write", options.write] if options.write else [])], environment)


if __name__ == "__main__":
    main()
