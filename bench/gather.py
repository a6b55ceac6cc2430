"""Embedding lookups: lowbit, torch and every installed peer in one run. python bench/gather.py [--help]

Random ids of a 128256 x 4096 table, new ones at each call, so rows come from DRAM. "fresh" allocates each output (and
pays its page faults), "reused" writes to one output. A row costs its packed bytes read and its output bytes written.
"""

from __future__ import annotations

import argparse
from functools import partial

import harness
from matmul import arguments, median_probe, start_workers
from shapes import IDS, TABLE

OUTPUT_BYTES = {"f32": 4, "bf16": 2}


def row_line(row: dict) -> str:
    where = f"{row['ids']:>5} ids {row['case']:<6} {row['subject']:<24}"
    if "failure" in row:
        return f"{where} failed: {row['failure']}"
    busy = "" if row["quiet"] else "  (busy)"
    return f"{where}{row['us']:>9.1f} us {row['ns_per_row']:>9.0f} ns a row  {row['gbps']:6.2f} GB/s{busy}"


def measure(options: argparse.Namespace, workers: dict, descriptions: dict) -> list[dict]:
    rows, cols = TABLE[0] if options.table_rows is None else options.table_rows, TABLE[1]
    held, results = [], []
    for module, described in descriptions.items():
        for subject in described["gather"]:
            if not options.only or any(word in subject["name"] for word in options.only):
                try:
                    made = workers[module].ask("table", name=subject["name"], cols=cols, rows=rows)
                    held.append({"module": module, **subject, **made})
                except harness.WorkerError as failure:
                    results.append({"subject": subject["name"], "ids": 0, "case": "table", "failure": str(failure)})
                    print(row_line(results[-1]), flush=True)
    for ids in IDS:
        for case in ("fresh", "reused"):
            slices = {}
            for subject in (s for s in held if case == "fresh" or s["reuses_output"]):
                worker = workers[subject["module"]]
                details = {"name": subject["name"], "count": ids, "case": case, "seconds": options.slice}
                slices[subject["name"]] = (worker, partial(worker.ask, "gather", **details))
            rounds = harness.alternate(slices, options.rounds, partial(harness.read_bandwidth, options.threads))
            for subject in (s for s in held if s["name"] in slices):
                measured = rounds[subject["name"]]
                size = ids * (subject["row_bytes"] + cols * OUTPUT_BYTES[subject["output"]])
                figures = measured[0] if "failure" in measured[0] else harness.summarise(measured, size)
                row = {
                    "subject": subject["name"],
                    "ours": subject["module"] == "ours",
                    "bits": subject["bits"],
                    "output": subject["output"],
                    "ids": ids,
                    "case": case,
                    "row_bytes": subject["row_bytes"],
                    **figures,
                }
                if "us" in row:
                    row["ns_per_row"] = row["us"] * 1000 / ids
                results.append(row)
                print(row_line(row), flush=True)
    return results


def main() -> None:
    parser = arguments(argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter))
    parser.add_argument("--table-rows", type=int, help=f"of the table; default {TABLE[0]}")
    options = parser.parse_args()
    modules = [m for m in options.modules if m in ("ours", "torch", "fbgemm")]
    workers, descriptions, missing = start_workers(options.python, options.threads, modules)
    ends = {"start": median_probe(partial(harness.read_bandwidth, options.threads))}
    try:
        rows = measure(options, workers, descriptions)
    finally:
        for worker in workers.values():
            worker.close()
    ends["end"] = median_probe(partial(harness.read_bandwidth, options.threads))
    versions = {k: v for described in descriptions.values() for k, v in described["versions"].items()}
    settings = {k: getattr(options, k) for k in ("threads", "rounds", "slice")}
    settings["table"] = [TABLE[0] if options.table_rows is None else options.table_rows, TABLE[1]]
    print(harness.save(harness.document("gather", settings, versions, missing, rows, ends), options.output))


if __name__ == "__main__":
    main()
