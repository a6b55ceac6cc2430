"""Everything in the README's tables: python bench/run.py [--python PEERS], about 40 minutes on two cores.

Runs the benchmarks below one after the other (matmul, gather and model with their peers in the same run), writes
results/<machine>/*.json and, with --write, the README's tables from them. ternary_quality takes most of the time.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

import harness

BENCHES = {  # results: (script and what it is given, the option that names the file)
    "matmul": (["matmul.py", "--shapes", "A", "B", "C", "--tokens", "1", "16"], "--output"),
    "gather": (["gather.py"], "--output"),
    "model": (["model.py"], "--output"),
    "model_ternary": (["model.py", "--shape", "ternary-2.7b"], "--output"),
    "quality": (["quality.py"], "--json"),
    "tied_quality": (["tied_quality.py"], "--json"),
    "ternary_quality": (["ternary_quality.py"], "--json"),
    "footprint": (["footprint.py"], "--output"),
}


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
        (script, *given), option = BENCHES[bench]
        command = [sys.executable, str(folder / script), *given, option, str(output)]
        command += ["--python", options.python] if bench in ("matmul", "gather") else []
        subprocess.run(command, check=True, env=environment)
        results.append(str(output))
    table = [sys.executable, str(folder / "table.py"), *results]
    subprocess.run(table + (["--write", options.write] if options.write else []), check=True, env=environment)


if __name__ == "__main__":
    main()
