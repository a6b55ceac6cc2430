"""Everything that the README states: python bench/run.py [--python PEERS], about 20 minutes on two cores.

Runs matmul, gather, model, quality and ternary_model one after the other (the first three with their peers in the same
run), writes results/<machine>/*.json and, with --write, the README's tables from them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

import harness

BENCHES = ("matmul", "gather", "model", "quality", "ternary_model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="interpreter of the peers' environment")
    parser.add_argument("--only", nargs="+", choices=BENCHES, default=list(BENCHES))
    parser.add_argument("--write", metavar="FILE", help="put the tables between this file's markers")
    options = parser.parse_args()
    folder = harness.ROOT / "bench"
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(harness.ROOT / "python"), os.environ.get("PYTHONPATH")])
    )
    results = []
    for bench in options.only:
        output = harness.RESULTS / harness.machine_name(harness.machine()) / f"{bench}.json"
        written = ["--json" if bench in ("quality", "ternary_model") else "--output", str(output)]
        command = [sys.executable, str(folder / f"{bench}.py"), *written]
        command += ["--python", options.python] if bench in ("matmul", "gather") else []
        subprocess.run(command, check=True, env=environment)
        results.append(str(output))
    table = [sys.executable, str(folder / "table.py"), *results]
    subprocess.run(table + (["--write", options.write] if options.write else []), check=True, env=environment)


if __name__ == "__main__":
    main()
