"""Matrix products: lowbit and every installed peer in one run. python bench/matmul.py [--help]

For each shape, subjects of one family (4 bits, 2 and 3, 8, dense, ternary) hold their weights at once and take turns,
round after round, with the bandwidth probe between any two slices. "dram": rotating over at least 500 MB of matrices;
"warm": one matrix over and over, shape A only.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial

import harness
from peers import MODULES
from shapes import FEW_TOKENS, SHAPES, TOKENS

FAMILIES = {4: "4 bits", 2: "2 and 3 bits", 3: "2 and 3 bits", 8: "8 bits", 16: "dense", 32: "dense"}


def family(subject: dict) -> str:
    return "ternary" if subject["ternary"] else FAMILIES[subject["bits"]]


def start_workers(python: str, threads: int, modules: list[str]) -> tuple[dict, dict, dict]:
    """(workers, descriptions, reasons of those not installed), by module. Ours runs under this interpreter."""
    workers, descriptions, missing = {}, {}, {}
    script = str(harness.ROOT / "bench" / "worker.py")
    for module in modules:
        worker = harness.Worker([sys.executable if module == "ours" else python, script, module], threads)
        try:
            descriptions[module] = worker.ask("describe")
            workers[module] = worker
        except harness.WorkerError as failure:
            missing[module] = str(failure)
            worker.close()
            print(f"not measured: {module}: {failure}", flush=True)
    return workers, descriptions, missing


def row_line(row: dict) -> str:
    where = f"{row['cols']}x{row['rows']} {row['tokens']:>4} {row['case']:<5} {row['subject']:<46}"
    if "failure" in row:
        return f"{where} failed: {row['failure']}"
    error = "" if row["error"] is None else f"  error {row['error']:.1e}"
    busy = "" if row["quiet"] else "  (busy)"
    return (
        f"{where}{row['us']:>10.0f} us  {row['gbps']:6.2f} GB/s of {row['probe_gbps']:5.1f}  share {row['share']:.2f}"
        f"{error}{busy}"
    )


class Run:
    def __init__(self, options: argparse.Namespace, workers: dict, descriptions: dict):
        self.options, self.workers = options, workers
        self.rows: list[dict] = []
        self.subjects = [
            {"module": module, **matmul} for module, described in descriptions.items() for matmul in described["matmul"]
        ]

    def shape(self, shape: str) -> None:
        cols, rows = SHAPES[shape]
        tokens = TOKENS if shape == "A" or self.options.all_tokens else FEW_TOKENS
        tokens = [t for t in tokens if not self.options.tokens or t in self.options.tokens]
        for name in dict.fromkeys((*FAMILIES.values(), "ternary")):
            held = []
            for subject in (s for s in self.subjects if family(s) == name and self._wanted(s)):
                try:
                    ask = self.workers[subject["module"]].ask
                    made = ask("weights", name=subject["name"], cols=cols, rows=rows, megabytes=self.options.megabytes)
                    held.append({**subject, **made})
                except harness.WorkerError as failure:
                    for count in tokens:
                        self._add(subject, shape, count, "dram", {"failure": str(failure)})
            for count in tokens:
                for case in ("dram", "warm") if shape == "A" else ("dram",):
                    self._measure(held, shape, count, case)
            for worker in self.workers.values():
                worker.ask("release")

    def _wanted(self, subject: dict) -> bool:
        return not self.options.only or any(word in subject["name"] for word in self.options.only)

    def _measure(self, held: list[dict], shape: str, tokens: int, case: str) -> None:
        slices, errors, kernels = {}, {}, {}
        for subject in held:
            name, worker = subject["name"], self.workers[subject["module"]]
            details = {"name": name, "tokens": tokens, "case": case, "seconds": self.options.slice}
            slices[name] = (worker, partial(worker.ask, "matmul", **details))
            try:
                errors[name] = (
                    worker.ask("error", name=name, tokens=tokens) if shape == "A" and case == "dram" else None
                )
                kernels[name] = worker.ask("kernel", verb="matmul")
            except harness.WorkerError:
                errors[name] = kernels[name] = None  # the slice will fail for the same reason, and the row will say it
        rounds = harness.alternate(slices, self.options.rounds, self._probe)
        for subject in held:
            name = subject["name"]
            failed = "failure" in rounds[name][0]
            figures = rounds[name][0] if failed else harness.summarise(rounds[name], subject["bytes"])
            if not failed:
                figures |= {"error": errors[name], "kernel": kernels[name]}
            self._add(subject, shape, tokens, case, figures)

    def _probe(self) -> float:
        return harness.read_bandwidth(self.options.threads)

    def _add(self, subject: dict, shape: str, tokens: int, case: str, figures: dict) -> None:
        cols, rows = SHAPES[shape]
        self.rows.append(
            {
                "subject": subject["name"],
                "ours": subject["module"] == "ours",
                "bits": subject["bits"],
                "ternary": subject["ternary"],
                "quantizes_activations": subject["quantizes_activations"],
                "shape": shape,
                "cols": cols,
                "rows": rows,
                "tokens": tokens,
                "case": case,
                **figures,
            }
        )
        print(row_line(self.rows[-1]), flush=True)


def arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The options that matmul.py and gather.py share."""
    parser.add_argument("--python", default=sys.executable, help="interpreter of the peers' environment")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slice", type=float, default=0.06, metavar="SECONDS", help="of one subject in a round")
    parser.add_argument("--only", action="append", default=[], metavar="WORD", help="subjects whose name contains it")
    parser.add_argument("--modules", nargs="+", choices=MODULES, default=list(MODULES))
    parser.add_argument("--output", help="default: results/<machine>/<benchmark>.json")
    return parser


def median_probe(probe: Callable[[], float]) -> float:
    return round(harness.quantile([probe() for _ in range(9)], 0.5) * 1e-9, 1)


def main() -> None:
    parser = arguments(argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter))
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, choices=TOKENS, help="only these")
    parser.add_argument("--all-tokens", action="store_true", help=f"{TOKENS} for every shape, not for A alone")
    parser.add_argument("--megabytes", type=int, default=500, help="of matrices to rotate over")
    options = parser.parse_args()
    workers, descriptions, missing = start_workers(options.python, options.threads, options.modules)
    probe = partial(harness.read_bandwidth, options.threads)
    ends = {"start": median_probe(probe)}
    run = Run(options, workers, descriptions)
    try:
        for shape in options.shapes:
            run.shape(shape)
    finally:
        for worker in workers.values():
            worker.close()
    ends["end"] = median_probe(probe)
    versions = {k: v for described in descriptions.values() for k, v in described["versions"].items()}
    settings = {k: getattr(options, k) for k in ("threads", "rounds", "slice", "megabytes")}
    print(harness.save(harness.document("matmul", settings, versions, missing, run.rows, ends), options.output))


if __name__ == "__main__":
    main()
