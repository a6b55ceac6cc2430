"""Embedding lookups: lowbit, torch and every installed peer in one run. python bench/gather.py [--help]

Random ids of a 128256 x 4096 table, new ones at each call, so rows come from DRAM. "fresh" allocates each output (and
pays its page faults), "reused" writes to one output, "op" is one id through torch.ops.lowbit.gather. "bags": sums of
4096 ids in 64 and 512 bags, of that table and of one of a million rows of 128. A call costs the packed bytes of its
rows read and its output bytes written: both count in its share of the probed read bandwidth.
"""

from __future__ import annotations

import argparse
from functools import partial

import harness
from matmul import arguments, median_probe, start_workers
from shapes import BAG_IDS, BAG_TABLES, BAGS, IDS, TABLE

OUTPUT_BYTES = {"f32": 4, "bf16": 2}


def row_line(row: dict) -> str:
    what = f"{row['bags']} bags" if row["case"] == "bags" else row["case"]
    where = f"{row['ids']:>5} ids {what:<8} {row.get('cols', ''):>5} columns {row['subject']:<24}"
    if "failure" in row:
        return f"{where} failed: {row['failure']}"
    busy = "" if row["quiet"] else "  (busy)"
    return (
        f"{where}{row['us']:>9.1f} us {row['ns_per_row']:>9.0f} ns a row  {row['gbps']:6.2f} GB/s  "
        f"share {row['share']:.2f}{busy}"
    )


class Run:
    def __init__(self, options: argparse.Namespace, workers: dict, descriptions: dict):
        self.options, self.workers, self.descriptions = options, workers, descriptions
        self.rows: list[dict] = []

    def lookups(self) -> None:
        held = self._tables("gather", "table", *self.sizes(TABLE))
        for ids in IDS:
            for case in ("fresh", "reused", "op") if ids == 1 else ("fresh", "reused"):
                able = {"fresh": None, "reused": "reuses_output", "op": "has_op"}[case]
                subjects = [s for s in held if able is None or s[able]]
                self._measure(subjects, "gather", {"count": ids, "case": case}, ids, ids, {"case": case})

    def bags(self) -> None:
        for table in BAG_TABLES:
            held = self._tables("bags", "bag_table", *self.sizes(table))
            for bags in BAGS:
                details = {"count": BAG_IDS, "bags": bags}
                self._measure(held, "bags", details, BAG_IDS, bags, {"case": "bags", "bags": bags})

    def sizes(self, table: tuple[int, int]) -> tuple[int, int]:
        rows, cols = table
        return (rows if self.options.table_rows is None else self.options.table_rows), cols

    def _tables(self, kind: str, question: str, rows: int, cols: int) -> list[dict]:
        """The subjects of a kind, each with its table; those held before are let go."""
        for worker in self.workers.values():
            worker.ask("release")
        held = []
        for module, described in self.descriptions.items():
            for subject in described[kind]:
                if self.options.only and not any(word in subject["name"] for word in self.options.only):
                    continue
                subject = {"module": module, "rows": rows, "cols": cols, **subject}
                try:
                    held.append(
                        subject | self.workers[module].ask(question, name=subject["name"], cols=cols, rows=rows)
                    )
                except harness.WorkerError as failure:
                    self._add({"subject": subject["name"], "ids": 0, "case": "table", "failure": str(failure)})
        return held

    def _measure(
        self, subjects: list[dict], question: str, details: dict, ids: int, written: int, described: dict
    ) -> None:
        """A row for each subject: `ids` rows read and `written` rows of output written in a call."""
        slices = {}
        for subject in subjects:
            worker = self.workers[subject["module"]]
            ask = partial(worker.ask, question, name=subject["name"], seconds=self.options.slice, **details)
            slices[subject["name"]] = (worker, ask)
        rounds = harness.alternate(slices, self.options.rounds, partial(harness.read_bandwidth, self.options.threads))
        for subject in subjects:
            measured = rounds[subject["name"]]
            size = ids * subject["row_bytes"] + written * subject["cols"] * OUTPUT_BYTES[subject["output"]]
            figures = measured[0] if "failure" in measured[0] else harness.summarise(measured, size)
            row = {
                "subject": subject["name"],
                "ours": subject["module"] == "ours",
                "bits": subject["bits"],
                "output": subject["output"],
                "rows": subject["rows"],
                "cols": subject["cols"],
                "ids": ids,
                **described,
                "row_bytes": subject["row_bytes"],
                **figures,
            }
            if "us" in row:
                row["ns_per_row"] = row["us"] * 1000 / ids
            self._add(row)

    def _add(self, row: dict) -> None:
        self.rows.append(row)
        print(row_line(row), flush=True)


def main() -> None:
    parser = arguments(argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter))
    parser.add_argument("--table-rows", type=int, help=f"of every table; default {TABLE[0]} and {BAG_TABLES[1][0]}")
    options = parser.parse_args()
    modules = [m for m in options.modules if m in ("ours", "torch", "fbgemm")]
    workers, descriptions, missing = start_workers(options.python, options.threads, modules)
    ends = {"start": median_probe(partial(harness.read_bandwidth, options.threads))}
    run = Run(options, workers, descriptions)
    try:
        run.lookups()
        run.bags()
    finally:
        for worker in workers.values():
            worker.close()
    ends["end"] = median_probe(partial(harness.read_bandwidth, options.threads))
    versions = {k: v for described in descriptions.values() for k, v in described["versions"].items()}
    settings = {k: getattr(options, k) for k in ("threads", "rounds", "slice")}
    settings["table"] = list(run.sizes(TABLE))
    print(harness.save(harness.document("gather", settings, versions, missing, run.rows, ends), options.output))


if __name__ == "__main__":
    main()
