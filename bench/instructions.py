"""Instructions of every kernel, counted one by one where the CPU's counters are hidden: `lowbit_micro --count`.

    python bench/instructions.py                             a table: 3 minutes
    python bench/instructions.py --filter int4_matmul        kernels that match
    python bench/instructions.py --json FILE                 that, and a result file

A count is that of one call in user mode, the same in every run of one build, and no time. It is divided by the lines of
64 bytes of codes that the call reads, for products by tokens as well; activations and store read no codes and count
for 64 values.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import harness
import table

PROGRAM = harness.ROOT / "build/dev/bench/micro/lowbit_micro"
NAME = re.compile(r"(\w+?)__(\w+?)(?:/(.*?))?/iterations:1")
FIGURES = {  # of a row, from the counters of the program
    "per_line": "instructions/line",
    "per_line_and_token": "instructions/line/token",
    "per_64_values": "instructions/64 values",
}


def count(program: Path, pattern: str) -> dict:
    """What the program reports of the kernels that match, as Google Benchmark writes it. Raises CalledProcessError."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "counts.json"
        flags = [f"--benchmark_filter={pattern}", f"--benchmark_out={file}", "--benchmark_out_format=json"]
        subprocess.run([program, "--count", *flags], check=True, stdout=sys.stderr)
        return json.loads(file.read_text() or '{"benchmarks": []}')


def rows_of(report: dict) -> tuple[list[dict], dict[str, str]]:
    """(a row for each count, the levels without one and why)."""
    rows, missing = [], {}
    for counted in report["benchmarks"]:
        kernel, isa, case = NAME.fullmatch(counted["name"]).groups("")
        if counted.get("error_occurred"):
            missing[isa] = counted["error_message"]
            continue
        figures = {name: round(counted[counter], 3) for name, counter in FIGURES.items() if counter in counted}
        row = {"kernel": kernel, "isa": isa, "case": case, "shape": counted["label"]}
        rows.append({**row, "instructions": round(counted["instructions"]), **figures})
    return rows, missing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--filter", default=".", metavar="REGEX", help="kernels, by name")
    parser.add_argument("--program", type=Path, default=PROGRAM, help="lowbit_micro; default that of `make dev`")
    parser.add_argument("--json", type=Path, help="results file")
    options = parser.parse_args()
    try:
        report = count(options.program, options.filter)
    except FileNotFoundError:
        sys.exit(f"{options.program}: not there; `make dev` builds it where Google Benchmark is found")
    except subprocess.CalledProcessError as failure:
        sys.exit(failure.returncode)  # it has said why
    rows, missing = rows_of(report)
    if not rows:
        sys.exit(f"--filter: no kernel that this CPU offers matches {options.filter}")
    versions = {name: report["context"][name] for name in ("lowbit", "compiler")}
    settings = {"filter": options.filter, "not_offered": missing}
    document = harness.document("instructions", settings, versions, {}, rows, {})
    print(table.markdown([document]))
    if options.json:
        print(harness.save(document, options.json))


if __name__ == "__main__":
    main()
