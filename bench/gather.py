"""Embedding lookups: lowbit, torch and every installed peer in one run. python bench/gather.py [--help]

Random ids of a 128256 x 4096 table, new ones at each call, so rows come from DRAM. "fresh" allocates each output (and
pays its page faults), "reused" writes to one output, "op" is one id through torch.ops.lowbit.gather. "bags": sums of
4096 ids in 64 and 512 bags, of that table and of one of a million rows of 128. A call costs the packed bytes of its
rows read and its output bytes written: both count in its share of the probed read bandwidth. With --seconds the rounds
are what fits; what did not fit is said.
"""

from __future__ import annotations

import argparse
from functools import partial

import harness
from budget import Budget
from matmul import arguments, median_probe, release, run_budget, start_workers
from shapes import BAG_IDS, BAG_TABLES, BAGS, IDS, TABLE

LOOKUPS_WEIGHT = 4.0  # of the time, beside 1 for the bags of a table
SETTING_UP = 0.6  # of that, after which no more tables are made
CASES = {"fresh": None, "reused": "reuses_output", "op": "has_op"}  # and what a subject must be able to do for it
OUTPUT_BYTES = {"f32": 4, "bf16": 2}


def row_line(row: dict) -> str:
    what = f"{row['bags']} bags" if row["case"] == "bags" else row["case"]
    where = f"{row['ids']:>5} ids {what:<8} {row.get('cols', ''):>5} columns {row['subject']:<24}"
    if "failure" in row:
        return f"{where} failed: {row['failure']}"
    if "left_out" in row:
        return f"{where} left out: {row['left_out']}"
    busy = "" if row["quiet"] else "  (busy)"
    return (
        f"{where}{row['us']:>9.1f} us {row['ns_per_row']:>9.0f} ns a row  {row['gbps']:6.2f} GB/s  "
        f"share {row['share']:.2f}{busy}"
    )


class Run:
    def __init__(self, options: argparse.Namespace, workers: dict, descriptions: dict, budget: Budget):
        self.options, self.workers, self.descriptions, self.budget = options, workers, descriptions, budget
        self.rows: list[dict] = []
        self.left_out: list[dict] = []

    def tables(self) -> None:
        """Lookups, which matter most, take most of the time; then the bags of each table."""
        parts = self.budget.parts([LOOKUPS_WEIGHT, *(1.0 for _ in BAG_TABLES)])
        self._lookups(next(parts))
        for table in BAG_TABLES:
            self._bags(table, next(parts))

    def _lookups(self, budget: Budget) -> None:
        cells = [(ids, case) for ids in IDS for case in CASES if case != "op" or ids == 1]
        held = self._tables("gather", "table", *self.sizes(TABLE), budget)
        goes = []
        for ids, case in cells:
            subjects = [s for s in held if CASES[case] is None or s[CASES[case]]]
            goes.append(Go(self, subjects, "gather", {"count": ids, "case": case}, ids, ids, {"case": case}))
        take(goes, self.options.rounds, budget)

    def _bags(self, table: tuple[int, int], budget: Budget) -> None:
        held = self._tables("bags", "bag_table", *self.sizes(table), budget)
        goes = []
        for bags in BAGS:
            details, described = {"count": BAG_IDS, "bags": bags}, {"case": "bags", "bags": bags}
            goes.append(Go(self, held, "bags", details, BAG_IDS, bags, described))
        take(goes, self.options.rounds, budget)

    def sizes(self, table: tuple[int, int]) -> tuple[int, int]:
        rows, cols = table
        return (rows if self.options.table_rows is None else self.options.table_rows), cols

    def _tables(self, kind: str, question: str, rows: int, cols: int, budget: Budget) -> list[dict]:
        """The subjects of a kind, each with its table; those held before are let go."""
        for worker in self.workers.values():
            release(worker)
        held, enough = [], SETTING_UP * budget.left() if budget.limited else 0.0
        for module, described in self.descriptions.items():
            for subject in described[kind]:
                if self.options.only and not any(word in subject["name"] for word in self.options.only):
                    continue
                subject = {"module": module, "rows": rows, "cols": cols, **subject}
                missing = {"subject": subject["name"], "ids": 0, "case": "table"}
                if budget.left() <= enough:
                    self.add({**missing, "cols": cols, "left_out": f"no time left to make its table ({kind})"})
                    continue
                try:
                    held.append(
                        subject | self.workers[module].ask(question, name=subject["name"], cols=cols, rows=rows)
                    )
                except harness.WorkerError as failure:
                    self.add({**missing, "failure": str(failure)})
        return held

    def add(self, row: dict) -> None:
        (self.left_out if "left_out" in row else self.rows).append(row)
        print(row_line(row), flush=True)


class Go:
    """The subjects' turns at one kind of call, which reads `ids` rows and writes `written` rows of output."""

    def __init__(
        self, run: Run, subjects: list[dict], question: str, details: dict, ids: int, written: int, described: dict
    ):
        self.run, self.subjects, self.ids, self.written, self.described = run, subjects, ids, written, described
        slices = {}
        for subject in subjects:
            worker = run.workers[subject["module"]]
            ask = partial(worker.ask, question, name=subject["name"], seconds=run.options.slice, **details)
            slices[subject["name"]] = (worker, ask)
        self.turns = harness.Alternation(slices, partial(harness.read_bandwidth, run.options.threads))

    def report(self) -> None:
        """A row for each subject."""
        for subject in self.subjects:
            measured = self.turns.results[subject["name"]]
            size = self.ids * subject["row_bytes"]
            size += self.written * subject["cols"] * OUTPUT_BYTES[subject["output"]]
            figures = harness.summarise(measured, size) if harness.was_measured(measured) else measured[0]
            row = {
                "subject": subject["name"],
                "ours": subject["module"] == "ours",
                "bits": subject["bits"],
                "output": subject["output"],
                "rows": subject["rows"],
                "cols": subject["cols"],
                "ids": self.ids,
                **self.described,
                "row_bytes": subject["row_bytes"],
                **figures,
            }
            if "us" in row:
                row["ns_per_row"] = row["us"] * 1000 / self.ids
            self.run.add(row)


def take(goes: list[Go], rounds: int, budget: Budget) -> None:
    """A round of everything, then more of each as time allows."""
    for go in goes:
        go.turns.first(budget)
    for go, part in zip(goes, budget.parts([1.0] * len(goes)), strict=True):
        go.turns.more(rounds - 1, part)
        go.report()


def main() -> None:
    parser = arguments(argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter))
    parser.add_argument("--table-rows", type=int, help=f"of every table; default {TABLE[0]} and {BAG_TABLES[1][0]}")
    options = parser.parse_args()
    budget = run_budget(options)
    modules = [m for m in options.modules if m in ("ours", "torch", "fbgemm")]
    workers, descriptions, missing = start_workers(options.python, options.threads, modules)
    ends = {"start": median_probe(partial(harness.read_bandwidth, options.threads))}
    run = Run(options, workers, descriptions, budget)
    try:
        run.tables()
    finally:
        for worker in workers.values():
            worker.close()
    ends["end"] = median_probe(partial(harness.read_bandwidth, options.threads))
    versions = {k: v for described in descriptions.values() for k, v in described["versions"].items()}
    settings = {k: getattr(options, k) for k in ("threads", "rounds", "slice", "seconds")}
    settings["table"] = list(run.sizes(TABLE))
    contents = harness.document("gather", settings, versions, missing, run.rows, ends, left_out=run.left_out)
    print(harness.save(contents, options.output))


if __name__ == "__main__":
    main()
