"""Matrix products: lowbit and every installed peer in one run. python bench/matmul.py [--help]

For each shape, subjects of one family (4 bits, 2 and 3, 8, dense, ternary) hold their weights at once and take turns,
round after round, with the bandwidth probe between any two slices. "dram": rotating over at least 500 MB of matrices;
"warm": one matrix over and over, shape A only. With --seconds the rounds are what fits; what did not fit is said.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable
from functools import partial

import harness
from budget import Budget
from peers import MODULES
from shapes import FEW_TOKENS, SHAPES, TOKENS

# What shape A is measured at, what matters most first, and how the time that is left after one round of everything is
# shared out for more. What a cell does not need goes to the next.
CELLS = {
    (1, "dram"): 3.0,
    (16, "dram"): 3.0,
    (1, "warm"): 2.0,
    (16, "warm"): 2.0,
    (128, "dram"): 3.0,
    (4, "dram"): 2.0,
    (4, "warm"): 1.5,
    (128, "warm"): 2.0,
    (512, "dram"): 4.0,
    (512, "warm"): 3.0,
}
SETTING_UP = 0.5  # of a family's time, after which no more matrices are made
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
    if "left_out" in row:
        return f"{where} left out: {row['left_out']}"
    error = "" if row["error"] is None else f"  error {row['error']:.1e}"
    busy = "" if row["quiet"] else "  (busy)"
    return (
        f"{where}{row['us']:>10.0f} us  {row['gbps']:6.2f} GB/s of {row['probe_gbps']:5.1f}  share {row['share']:.2f}"
        f"{error}{busy}"
    )


class Run:
    def __init__(self, options: argparse.Namespace, workers: dict, descriptions: dict, budget: Budget):
        self.options, self.workers, self.budget = options, workers, budget
        self.rows: list[dict] = []
        self.left_out: list[dict] = []
        self.subjects = [
            {"module": module, **matmul} for module, described in descriptions.items() for matmul in described["matmul"]
        ]

    def shapes(self) -> None:
        families: dict[tuple, list[dict]] = {}
        for shape in self.options.shapes:
            for name in (*FAMILIES.values(), "ternary"):
                members = [s for s in self.subjects if family(s) == name and self._wanted(s)]
                if members:
                    families[shape, name] = members
        parts = self.budget.parts([len(members) for members in families.values()])
        for ((shape, _), members), part in zip(families.items(), parts, strict=True):
            self._family(shape, members, part)

    def _family(self, shape: str, members: list[dict], budget: Budget) -> None:
        cells = [c for c in CELLS if shape == "A" or self.options.all_tokens or c[0] in FEW_TOKENS]
        cells = [c for c in cells if not self.options.tokens or c[0] in self.options.tokens]
        cells = [c for c in cells if shape == "A" or c[1] == "dram"]
        held = self._make(shape, members, cells, budget)
        turns, seconds = {}, {"dram": (1, {}), "warm": (1, {})}
        for tokens, case in cells:
            before, known = seconds[case]
            expected = {name: guess(s, before, tokens, self.options.slice) for name, s in known.items()}
            turns[tokens, case] = self._alternation(held, tokens, case, expected)
            turns[tokens, case].first(budget)
            seconds[case] = tokens, turns[tokens, case].seconds
        for cell, part in zip(cells, budget.parts([CELLS[cell] for cell in cells]), strict=True):
            turns[cell].more(self.options.rounds - 1, part)
            self._report(held, shape, *cell, turns[cell].results)
        for worker in self.workers.values():
            release(worker)

    def _make(self, shape: str, members: list[dict], cells: list[tuple], budget: Budget) -> list[dict]:
        """Those of `members` that made their matrices, or the reasons in the rows of those that did not."""
        cols, rows = SHAPES[shape]
        held, enough = [], SETTING_UP * budget.left() if budget.limited else 0.0
        for subject in members:
            result: dict = {"left_out": "no time left to make its matrices"}
            if budget.left() > enough:
                try:
                    ask = self.workers[subject["module"]].ask
                    made = ask("weights", name=subject["name"], cols=cols, rows=rows, megabytes=self.options.megabytes)
                    ready = {**subject, **made, "errors": self._errors(subject, shape, cells)}
                    tokens, case = cells[0]  # libraries build graphs and choose kernels: not in anyone's turn
                    ask("matmul", name=subject["name"], tokens=tokens, case=case, seconds=0.0)
                    held.append(ready)
                    continue
                except harness.WorkerError as failure:
                    result = {"failure": str(failure)}
            for tokens, case in cells:
                self._add(subject, shape, tokens, case, result)
        return held

    def _errors(self, subject: dict, shape: str, cells: list[tuple]) -> dict[int, float]:
        """By tokens, of shape A. The slice of a subject that cannot tell will fail for the same reason."""
        errors: dict[int, float] = {}
        with contextlib.suppress(harness.WorkerError):
            for tokens in dict.fromkeys(tokens for tokens, _ in cells):
                if shape == "A" and tokens in self.options.error_tokens:
                    errors[tokens] = self.workers[subject["module"]].ask("error", name=subject["name"], tokens=tokens)
        return errors

    def _wanted(self, subject: dict) -> bool:
        return not self.options.only or any(word in subject["name"] for word in self.options.only)

    def _alternation(self, held: list[dict], tokens: int, case: str, expected: dict) -> harness.Alternation:
        slices = {}
        for subject in held:
            worker, name = self.workers[subject["module"]], subject["name"]
            ask = partial(worker.ask, "matmul", name=name, tokens=tokens, case=case, seconds=self.options.slice)
            slices[name] = (worker, ask)
        return harness.Alternation(slices, self._probe, seconds=expected)

    def _report(self, held: list[dict], shape: str, tokens: int, case: str, results: dict[str, list[dict]]) -> None:
        for subject in held:
            rounds = results[subject["name"]]
            figures = rounds[0]
            if harness.was_measured(rounds):
                details = {"name": subject["name"], "tokens": tokens, "case": case}
                kernel = None
                with contextlib.suppress(harness.WorkerError):  # it has ended meanwhile, with what it had measured
                    kernel = self.workers[subject["module"]].ask("kernel", **details)
                error = subject["errors"].get(tokens) if case == "dram" else None
                figures = harness.summarise(rounds, subject["bytes"]) | {"error": error, "kernel": kernel}
            self._add(subject, shape, tokens, case, figures)

    def _probe(self) -> float:
        return harness.read_bandwidth(self.options.threads)

    def _add(self, subject: dict, shape: str, tokens: int, case: str, figures: dict) -> None:
        cols, rows = SHAPES[shape]
        row = {
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
        (self.left_out if "left_out" in row else self.rows).append(row)
        print(row_line(row), flush=True)


def guess(seconds: float, before: int, tokens: int, slice_seconds: float) -> float:
    """Seconds of a turn of `tokens` from those of one of `before`: what it took beyond its slice and the probe (calls
    that outlast a slice) grows with the tokens."""
    usual = slice_seconds + 0.05
    return usual + max(0.0, seconds - usual) * max(1.0, tokens / before)


def release(worker: harness.Worker) -> None:
    """Lets go of everything a library holds. One that has ended holds nothing."""
    with contextlib.suppress(harness.WorkerError):
        worker.ask("release")


def arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The options that matmul.py and gather.py share."""
    parser.add_argument("--python", default=sys.executable, help="interpreter of the peers' environment")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, help="for the whole run: rounds, up to --rounds, as fit into it")
    parser.add_argument("--slice", type=float, default=0.06, metavar="SECONDS", help="of one subject in a round")
    parser.add_argument("--only", action="append", default=[], metavar="WORD", help="subjects whose name contains it")
    parser.add_argument("--modules", nargs="+", choices=MODULES, default=list(MODULES))
    parser.add_argument("--output", help="default: results/<machine>/<benchmark>.json")
    return parser


def run_budget(options: argparse.Namespace) -> Budget:
    return Budget() if options.seconds is None else Budget(options.seconds)


def median_probe(probe: Callable[[], float]) -> float:
    return round(harness.quantile([probe() for _ in range(9)], 0.5) * 1e-9, 1)


def main() -> None:
    parser = arguments(argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter))
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, choices=TOKENS, help="only these")
    parser.add_argument("--all-tokens", action="store_true", help=f"{TOKENS} for every shape, not for A alone")
    parser.add_argument("--error-tokens", nargs="*", type=int, default=TOKENS, help="errors with so many tokens only")
    parser.add_argument("--megabytes", type=int, default=500, help="of matrices to rotate over")
    options = parser.parse_args()
    budget = run_budget(options)
    workers, descriptions, missing = start_workers(options.python, options.threads, options.modules)
    probe = partial(harness.read_bandwidth, options.threads)
    ends = {"start": median_probe(probe)}
    rates = [harness.multiply_rates(options.threads)]
    run = Run(options, workers, descriptions, budget)
    try:
        run.shapes()
    finally:
        for worker in workers.values():
            worker.close()
    ends["end"] = median_probe(probe)
    rates.append(harness.multiply_rates(options.threads))
    best = {kind: max(r[kind] for r in rates) for kind in rates[0]}  # a roof is the most that was seen
    versions = {k: v for described in descriptions.values() for k, v in described["versions"].items()}
    settings = {k: getattr(options, k) for k in ("threads", "rounds", "slice", "megabytes", "seconds")}
    contents = harness.document(
        "matmul", settings, versions, missing, run.rows, ends, left_out=run.left_out, multiply_gops=best
    )
    print(harness.save(contents, options.output))


if __name__ == "__main__":
    main()
