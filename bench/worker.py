"""A process that holds one library's weights and times slices on request: python worker.py <module of peers>."""

from __future__ import annotations

import gc
import importlib
import sys
from functools import partial

import harness


class Library:
    """The questions that matmul.py and gather.py ask of one library."""

    def __init__(self, module: str):
        self.name = module
        self.held: dict[str, object] = {}
        self.calls: dict[tuple, list] = {}  # (subject, size, case) -> thunks, so that a round only times
        self.matrices: dict[tuple, int] = {}  # of each such call: graphs of several products may differ by tokens
        self.position: dict[tuple, int] = {}
        self.kernels: dict[tuple, str] = {}  # that the last call of a slice of products ran

    def describe(self) -> dict:
        self.module = importlib.import_module(f"peers.{self.name}")
        versions = self.module.available()
        return {
            "versions": versions,
            "matmul": [
                {"name": m.name, "bits": m.bits, "quantizes_activations": m.quantizes_activations, "ternary": m.ternary}
                for m in self.module.MATMUL
            ],
            "gather": [{"name": g.name, "bits": g.bits, "output": g.output} for g in self.module.GATHER],
            "bags": [{"name": g.name, "bits": g.bits, "output": g.output} for g in getattr(self.module, "BAGS", [])],
        }

    def weights(self, name: str, cols: int, rows: int, megabytes: int) -> dict:
        """Makes matrices of `megabytes` in all, at least two."""
        subject = next(m for m in self.module.MATMUL if m.name == name)
        self.held[name] = made = subject.weights(cols, rows, megabytes)
        gc.collect()
        return {"bytes": made.bytes}

    def table(self, name: str, cols: int, rows: int) -> dict:
        subject = next(g for g in self.module.GATHER if g.name == name)
        self.held[name] = made = subject.table(rows, cols)
        gc.collect()
        return {
            "row_bytes": made.row_bytes,
            "reuses_output": made.output(1) is not None,
            "has_op": hasattr(made, "op"),
        }

    def bag_table(self, name: str, cols: int, rows: int) -> dict:
        subject = next(g for g in self.module.BAGS if g.name == name)
        self.held[name] = made = subject.table(rows, cols)
        gc.collect()
        return {"row_bytes": made.row_bytes}

    def release(self) -> None:
        self.held.clear()
        self.calls.clear()
        self.matrices.clear()
        self.position.clear()
        self.kernels.clear()
        gc.collect()

    def error(self, name: str, tokens: int) -> float:
        return self.held[name].error(tokens)

    def matmul(self, name: str, tokens: int, case: str, seconds: float) -> list[float]:
        """A slice: seconds per matrix. case: "dram" goes through all the copies, "warm" stays on one."""
        held = self.held[name]
        key = (name, tokens, case)
        calls = self._calls(key, lambda: held.calls(tokens) if case == "dram" else [held.warm(tokens)])
        self.matrices.setdefault(key, held.matrices_per_call if case == "dram" else 1)
        taken = self._slice(key, calls, seconds, self.matrices[key])
        if hasattr(self.module, "last_kernel"):
            self.kernels[key] = self.module.last_kernel("matmul")
        return taken

    def gather(self, name: str, count: int, case: str, seconds: float) -> list[float]:
        """A slice: seconds per call. case: "fresh" allocates each output, "reused" writes to one again and again, "op"
        goes through the library's operator."""
        table = self.held[name]

        def make() -> list:
            # Enough different rows that the table is read from DRAM, and that no call repeats a recent one.
            sets = [table.ids(count) for _ in range({1: 16384, 64: 2048}.get(count, 64))]
            if case in ("fresh", "op"):
                lookup = table.gather if case == "fresh" else table.op
                return [lambda ids=ids: lookup(ids) for ids in sets]
            output = table.output(count)
            return [lambda ids=ids: table.gather_into(ids, output) for ids in sets]

        return self._slice((name, count, case), self._calls((name, count, case), make), seconds, 1)

    def bags(self, name: str, count: int, bags: int, seconds: float) -> list[float]:
        """A slice: seconds per call that sums `count` ids in `bags` bags."""
        table = self.held[name]

        def make() -> list:
            return [partial(table.sum, table.bags(count, bags)) for _ in range(64)]

        return self._slice((name, count, bags), self._calls((name, count, bags), make), seconds, 1)

    def kernel(self, name: str, tokens: int, case: str) -> str | None:
        """The kernel that ran in the last slice of these products, where the library tells."""
        return self.kernels.get((name, tokens, case))

    def _calls(self, key: tuple, make) -> list:
        if key not in self.calls:
            self.calls[key] = make()
        return self.calls[key]

    def _slice(self, key: tuple, calls: list, seconds: float, per_call: int) -> list[float]:
        # The first calls wake the library's threads, choose its kernels and bring a warm matrix back into the cache.
        warm_up = 2 if len(calls) == 1 or key not in self.position else 1
        taken, self.position[key] = harness.time_slice(calls, self.position.get(key, 0), seconds, warm_up)
        return [t / per_call for t in taken]


if __name__ == "__main__":
    library = Library(sys.argv[1])
    questions = ("describe", "weights", "table", "bag_table", "release", "error", "matmul", "gather", "bags", "kernel")
    harness.serve({question: getattr(library, question) for question in questions})
