"""GPU: products, gather, unpack and the GPTQ solver beside torch's fp16 products, in microseconds and shares of the
floor.

    python bench/gpu.py                     everything; results/<gpu>/gpu.json, and the table of figures to reach
    python bench/gpu.py --only 'int4 .*M=1\\b'
    python bench/gpu.py --table A/gpu.json --write bench/results/README.md     no GPU needed

Each row is a CUDA graph of launches that walk through at least 200 MB of weights, so that none is found in the L2
cache; replays of all subjects of a shape take turns and the figure is the median over replays. Clocks are used as they
are found. lowbit is called through its C API (capi.py); x, y, weights and scales lie on the GPU before the clock
starts.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import capi
import harness

BEGIN, END = "<!-- gpu:begin -->", "<!-- gpu:end -->"
DATASHEET = 4.8e12  # bytes a second, H200
TENSOR = 790e12  # fp16 or bf16 operations a second that a dense product reaches there on random data
ROTATE_BYTES = 200_000_000
SHAPES = {"A": (4096, 4096), "B": (4096, 12288), "C": (8192, 28672), "head": (4096, 128256)}  # (K, N)
TOKENS = (1, 16, 64, 256, 4096)
TABLE = (4096, 128256)  # columns, rows of the embedding


# ---- what is measured ----


@dataclasses.dataclass(frozen=True)
class Case:
    """A row. bits 1: trit, one scale a row. what: "matmul", "gather", "unpack", "solve"; count: tokens or ids."""

    what: str
    bits: int
    cols: int
    rows: int
    count: int = 1
    group_size: int = 128
    activations: int = capi.ACT_FLOAT

    @property
    def format(self) -> str:
        return "trit" if self.bits == capi.TRIT else f"int{self.bits}"

    @property
    def name(self) -> str:
        mode = " int8 activations" if self.activations == capi.ACT_INT8 else ""
        counted = {"matmul": f" M={self.count}", "gather": f" ids={self.count}"}.get(self.what, "")
        return f"{self.what} {self.format}{mode} ({self.cols},{self.rows}){counted}"


def cases() -> list[Case]:
    """Everything that bench/results/README.md names, shape by shape."""
    found = []
    for cols, rows in SHAPES.values():
        found += [Case("matmul", 4, cols, rows, tokens) for tokens in TOKENS]
        found += [Case("matmul", bits, cols, rows) for bits in (8, 3, 2)]
        found.append(Case("matmul", capi.TRIT, cols, rows, group_size=-1))
    found.append(Case("matmul", 4, 8192, 8192))  # beside Marlin
    found += [Case("matmul", 4, *SHAPES["C"], tokens, activations=capi.ACT_INT8) for tokens in (1, 16)]
    found += [Case("gather", bits, *TABLE, count) for bits in (4, 8) for count in (1, 8192)]
    found += [Case("unpack", bits, *SHAPES["C"]) for bits in (4, 8)]
    found.append(Case("solve", 4, 4096, 4096))
    return found


def groups(case: Case) -> int:
    return 1 if case.group_size == -1 else -(-case.cols // case.group_size)


def row_lines(bits: int, cols: int) -> int:
    """Lines of 64 bytes of a row: formats.h."""
    if bits == 3:
        low = -(-cols // 256)  # of 2 bits; every two of them share a line of high bits
        return low + -(-low // 2)
    return -(-cols // {8: 64, 4: 128, 2: 256, capi.TRIT: 320}[bits])


def weight_bytes(case: Case) -> int:
    """Codes and fp16 scales of a matrix (symmetric: no zeros)."""
    return case.rows * (64 * row_lines(case.bits, case.cols) + 2 * groups(case))


def moved_bytes(case: Case) -> int:
    """The least that a call reads and writes, fp16 in and out."""
    if case.what == "matmul":
        return weight_bytes(case) + 2 * case.count * (case.cols + case.rows)
    if case.what == "gather":
        return case.count * (weight_bytes(case) // case.rows + 2 * case.cols + 8)
    if case.what == "unpack":
        return weight_bytes(case) + 2 * case.rows * case.cols
    return 0


def operations(case: Case) -> int:
    if case.what == "matmul":
        return 2 * case.count * case.cols * case.rows
    return case.rows * case.cols**2 if case.what == "solve" else 0


def floor_us(case: Case) -> float:
    """Bytes at the datasheet's rate, or operations at the tensor cores': the larger."""
    dense = operations(case) / TENSOR if case.what == "matmul" else 0.0
    return max(moved_bytes(case) / DATASHEET, dense) * 1e6


def copies(case: Case) -> int:
    """Matrices to walk through: 200 MB of them, at least two."""
    return max(2, -(-ROTATE_BYTES // weight_bytes(case)))


def launches(case: Case) -> int:
    """Nodes of a graph: every matrix, and enough that the graph's own start is lost in it."""
    rounds = max(1, round(2000 / (copies(case) * max(floor_us(case), 1.0))))
    return copies(case) * min(rounds, 64)


# ---- the figures to reach, and what was found ----


@dataclasses.dataclass(frozen=True)
class Figure:
    """A line of results/README.md. value: of the rows found (case name -> row) and the probe's figures, or None."""

    what: str
    goal: str
    value: object
    reached: object
    shown: str  # a format of the value


def _taken(rows: dict, name: str) -> dict:
    """The row of the way that the plan would have a caller take: the kernel, or unpacking and a dense product."""
    row = rows.get(name, {})
    return rows.get(f"{name} unpacked", {}) if row.get("prefers_unpack") else row


def _row(name: str, field: str):
    return lambda rows, probe: _taken(rows, name).get(field)


def _quotient(name: str, over: str):
    """How many times as fast `name` is as `over`."""

    def value(rows, probe):
        mine, theirs = _taken(rows, name).get("us"), rows.get(over, {}).get("us")
        return theirs / mine if mine and theirs else None

    return value


def _probe(name: str, scale: float = 1.0):
    return lambda rows, probe: probe[name] * scale if name in probe else None


def _trit_bandwidth(rows, probe):
    row = rows.get("matmul trit (8192,28672) M=1", {})
    return row["gbps"] * 1e-3 / probe["read"] if "gbps" in row and "read" in probe else None


def _worst_error(rows, probe):
    errors = [row["error"] for row in rows.values() if "error" in row]
    return max(errors) if errors else None


def _worst_exact(rows, probe):
    errors = [row["exact_error"] for row in rows.values() if "exact_error" in row]
    return max(errors) if errors else None


def _subnormals(rows, probe):
    errors = [value for name, value in probe.items() if re.match(r"fp16 subnormals, \d bits|bf16, 128|u8 x s8", name)]
    return max(errors) if errors else None


def figures() -> list[Figure]:
    found = [
        Figure("exact products through the tensor core: fp16 subnormals, 128 + 8·code in bf16, u8·s8", "0",
               _subnormals, lambda v: v == 0, "{:.1e}"),
        Figure("read bandwidth of the card", "known", _probe("read"), lambda v: True, "{:.2f} TB/s"),
        Figure("mma.sync fp16 from registers", "known", _probe("mma.sync fp16"), lambda v: True, "{:.0f} TFLOP/s"),
        Figure("mma.sync u8·s8 from registers", "known", _probe("mma.sync u8s8"), lambda v: True, "{:.0f} TOP/s"),
    ]  # fmt: skip
    for shape in ("C", "head"):
        for tokens in (1, 16):
            cols, rows = SHAPES[shape]
            found.append(
                Figure(f"int4 g128, ({cols}, {rows}), {tokens} tokens: share of 4.8 TB/s", "≥ 85%",
                       _row(f"matmul int4 ({cols},{rows}) M={tokens}", "share"), lambda v: v >= 0.85, "{:.0%}")
            )  # fmt: skip
    for name, most in (("(4096,12288)", 8.5), ("(4096,4096)", 4.6)):
        for tokens in (1, 16):
            found.append(
                Figure(f"int4 g128, {name.replace(',', ', ')}, {tokens} tokens, in a graph", f"≤ {most} µs",
                       _row(f"matmul int4 {name} M={tokens}", "us"), lambda v, most=most: v <= most, "{:.2f} µs")
            )  # fmt: skip
    for tokens in (1, 16):
        name = f"(8192,28672) M={tokens}"
        found.append(
            Figure(f"int4 g128, (8192, 28672), {tokens} tokens, against cuBLAS fp16", "≥ 3.3×",
                   _quotient(f"matmul int4 {name}", f"cublas {name}"), lambda v: v >= 3.3, "{:.2f}×")
        )  # fmt: skip
    found.append(
        Figure("int4 g128, (8192, 8192), one token, against Marlin", "≥ 1.4×",
               _quotient("matmul int4 (8192,8192) M=1", "marlin (8192,8192) M=1"), lambda v: v >= 1.4, "{:.2f}×")
    )  # fmt: skip
    for tokens, least, further in ((64, 0.60, " (further: 75%)"), (256, 0.75, "")):
        for shape in ("B", "C"):
            cols, rows = SHAPES[shape]
            found.append(
                Figure(f"int4 g128, ({cols}, {rows}), {tokens} tokens: share of the floor", f"≥ {least:.0%}{further}",
                       _row(f"matmul int4 ({cols},{rows}) M={tokens}", "floor_share"),
                       lambda v, least=least: v >= least, "{:.0%}")
            )  # fmt: skip
    name = "(8192,28672) M=4096"
    found += [
        Figure("int4 g128, (8192, 28672), 4096 tokens, against cuBLAS fp16", "≥ 85% of its rate",
               _quotient(f"matmul int4 {name}", f"cublas {name}"), lambda v: v >= 0.85, "{:.0%}"),
        Figure("int4 g128, (8192, 28672), 4096 tokens: rate", "≥ 650 TFLOP/s",
               _row(f"matmul int4 {name}", "tflops"), lambda v: v >= 650, "{:.0f} TFLOP/s"),
    ]  # fmt: skip
    for fmt, least in (("int2", 0.60), ("int3", 0.70), ("int8", 0.88)):
        found.append(
            Figure(f"{fmt} g128, (8192, 28672), one token: share of 4.8 TB/s", f"≥ {least:.0%}",
                   _row(f"matmul {fmt} (8192,28672) M=1", "share"), lambda v, least=least: v >= least, "{:.0%}")
        )  # fmt: skip
    found += [
        Figure("trit, (8192, 28672), one token: share of 4.8 TB/s, on its 1.6-bit bytes", "≥ 70%",
               _row("matmul trit (8192,28672) M=1", "share"), lambda v: v >= 0.70, "{:.0%}"),
        Figure("trit, (8192, 28672), one token: share of the measured read bandwidth", "≥ 80%",
               _trit_bandwidth, lambda v: v >= 0.80, "{:.0%}"),
        Figure("trit against our int2, (8192, 28672), one token", "≥ 1.1×",
               _quotient("matmul trit (8192,28672) M=1", "matmul int2 (8192,28672) M=1"),
               lambda v: v >= 1.1, "{:.2f}×"),
    ]  # fmt: skip
    for fmt in ("int4", "int8"):
        found += [
            Figure(f"gather {fmt}, 8192 ids × 4096 columns: share of 4.8 TB/s, read and written",
                   "≥ 80% (further: 85%)", _row(f"gather {fmt} (4096,128256) ids=8192", "share"),
                   lambda v: v >= 0.80, "{:.0%}"),
            Figure(f"gather {fmt}, one id × 4096 columns", "≤ 4 µs",
                   _row(f"gather {fmt} (4096,128256) ids=1", "us"), lambda v: v <= 4.0, "{:.2f} µs"),
        ]  # fmt: skip
    found += [
        Figure("error of a product with fp16 activations, worst of the above", "≤ 2e-3",
               _worst_error, lambda v: v <= 2e-3, "{:.1e}"),
        Figure("error where integers make a product exact", "0", _worst_exact, lambda v: v == 0, "{:.1e}"),
        Figure("unpack int4 to fp16, (8192, 28672): share of 4.8 TB/s", "known",
               _row("unpack int4 (8192,28672)", "share"), lambda v: True, "{:.0%}"),
        Figure("GPTQ solver, 4096 × 4096, int4 g128", "known",
               _row("solve int4 (4096,4096)", "us"), lambda v: True, "{:,.0f} µs"),
    ]  # fmt: skip
    return found


def figures_table(contents: dict | None) -> str:
    """Every figure, its goal, and what was measured; without a result file all of them are not measured."""
    rows = {row["name"]: row for row in contents["rows"]} if contents else {}
    probe = contents["probe"] if contents else {}
    lines = ["| figure | to reach | |", "|---|---|---|"]
    for figure in figures():
        value = figure.value(rows, probe)
        shown = "not measured"
        if value is not None:
            verdict = "" if figure.goal == "known" else ", reached" if figure.reached(value) else ", **not reached**"
            shown = figure.shown.format(value) + verdict
        lines.append(f"| {figure.what} | {figure.goal} | {shown} |")
    return "\n".join(lines)


def origin(contents: dict) -> str:
    gpu = contents["machine"]
    missing = "; ".join(f"{name}: {why}" for name, why in contents["not_installed"].items())
    return (
        f"{gpu['gpu']}, driver {gpu['driver']}, {contents['date'][:10]}, commit {contents['commit'][:9]}"
        f"{' with changes' if contents['dirty'] else ''}; torch {contents['versions'].get('torch', '?')}; "
        f"clocks as found: {gpu.get('clocks', {})}"
        + (f". Not installed, so not measured: {missing}." if missing else "")
    )


def replace_between(text: str, new: str) -> str:
    """`text` with `new` between the markers. Raises ValueError unless each stands there once, in order."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"expected one {BEGIN} and one {END} after it")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{new}\n{END}{rest.split(END)[1]}"


# ---- the card ----


QUERY = "name driver_version compute_cap clocks.sm clocks.mem clocks.max.sm clocks.max.mem power.limit temperature.gpu"


def card(query: str | None = None) -> dict:
    """What nvidia-smi says of the first GPU; clocks are read, never set. query: its output, else it is run."""
    fields = QUERY.split()
    if query is None:
        command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
        query = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    values = dict(zip(fields, (value.strip() for value in query.splitlines()[0].split(",")), strict=True))
    return {
        "gpu": values["name"],
        "driver": values["driver_version"],
        "compute_capability": values["compute_cap"],
        "clocks": {name: values[name] for name in fields[3:]},
    }


def slug(name: str) -> str:
    """A folder name: 'nvidia-h200'."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def architecture(compute_capability: str) -> str:
    """CMAKE_CUDA_ARCHITECTURES for the card at hand: '9.0' -> '90a-real'."""
    number = compute_capability.replace(".", "")
    return f"{number}a-real" if number == "90" else f"{number}-real"


def read_probe(text: str) -> dict[str, float]:
    """gpu_probe's JSON as name -> value."""
    return {figure["name"]: figure["value"] for figure in json.loads(text)["figures"]}


def find_probe() -> Path | None:
    built = harness.ROOT / "build/gpu/tests/gpu/gpu_probe"
    return built if built.is_file() else None


# ---- running ----


class Gpu:
    """Where work is queued and how it is timed: torch's current device. Tests put the emulated device in its place."""

    def __init__(self):
        import torch

        self.torch = torch
        self.device = "cuda"

    @property
    def queue(self) -> capi.Queue:
        return capi.Queue(self.torch.cuda.current_device(), self.torch.cuda.current_stream().cuda_stream)

    def graph(self, calls: list):
        """A replay of `calls`, captured. The first run outside the graph brings kernels and workspaces in."""
        torch = self.torch
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return graph.replay

    def seconds(self, run) -> float:
        torch = self.torch
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3

    def zeroed(self, size: int):
        """Bytes of zeros at a multiple of 256, as all of torch's memory on a GPU."""
        return self.torch.zeros(size, dtype=self.torch.uint8, device=self.device)

    def synchronize(self) -> None:
        self.torch.cuda.synchronize()

    def release(self) -> None:
        self.torch.cuda.empty_cache()


def take_turns(gpu, subjects: dict, replays: int, budget: float) -> dict[str, list[float]]:
    """Seconds of every replay of every subject, in turns, after two of each to warm up; ends early after `budget` s."""
    for run in subjects.values():
        run()
        run()
    gpu.synchronize()
    taken: dict[str, list[float]] = {name: [] for name in subjects}
    begin = time.monotonic()
    for turn in range(replays):
        for name, run in subjects.items():
            taken[name].append(gpu.seconds(run))
        if turn >= 4 and time.monotonic() - begin > budget:
            break
    return taken


def summary(seconds: list[float], per_run: int) -> dict:
    us = sorted(s / per_run * 1e6 for s in seconds)
    return {
        "us": statistics.median(us),
        "us_min": us[0],
        "us_p90": harness.quantile(us, 0.9),
        "replays": len(us),
        "launches": per_run,
    }


class Weights:
    """A matrix of random codes on the device, fp16 scales, symmetric. Its codes stay when `keep_codes`."""

    def __init__(self, gpu, library: capi.Library, case: Case, unit_scales: bool = False, keep_codes: bool = False):
        torch = gpu.torch
        top = 3 if case.bits == capi.TRIT else 2**case.bits
        codes = torch.randint(0, top, (case.rows, case.cols), dtype=torch.uint8, device=gpu.device)
        size = case.rows * library.row_bytes(case.bits, case.cols)
        self.lines = torch.zeros(size, dtype=torch.uint8, device=gpu.device)
        shape = (case.rows, groups(case))
        self.scales = torch.rand(shape, device=gpu.device).mul_(0.01).add_(0.005).to(torch.float16)
        if unit_scales:
            self.scales.fill_(1)
        self.view = capi.Matrix(
            format=case.bits,
            rows=case.rows,
            cols=case.cols,
            group_size=case.group_size if case.group_size > 0 else case.cols,
            codes=self.lines.data_ptr(),
            scales=self.scales.data_ptr(),
            scale_dtype=capi.F16,
            scale_rows=shape[0],
            scale_cols=shape[1],
        )
        library.pack_codes(gpu.queue, self.view, codes.data_ptr(), self.lines.data_ptr(), None)
        gpu.synchronize()
        self.codes = codes if keep_codes else None

    def dense(self, case: Case, rows: slice):
        """float64 of some rows."""
        middle = 1 << (case.bits - 1)
        codes = self.codes[rows].double() - middle
        size = self.view.group_size
        return codes * self.scales[rows].double().repeat_interleave(size, 1)[:, : case.cols]


class Products:
    """lowbit's product of one case, over as many matrices as have to rotate."""

    def __init__(self, gpu, library: capi.Library, case: Case, held: list[Weights]):
        torch = gpu.torch
        self.gpu, self.library, self.case, self.held = gpu, library, case, held
        self.x = torch.randn(case.count, case.cols, device=gpu.device).add_(0.3).to(torch.float16)
        self.y = torch.full((case.count, case.rows), float("nan"), dtype=torch.float16, device=gpu.device)
        self.plan = library.plan(library.device(), held[0].view, case.count, capi.F16, case.activations)
        size = max(1, self.plan.workspace_bytes)
        self.workspaces = [gpu.zeroed(size) for _ in held]

    def calls(self) -> list:
        return [lambda w=w, s=s: self._call(w, s) for w, s in zip(self.held, self.workspaces, strict=True)]

    def _call(self, w: Weights, workspace) -> None:
        case = self.case
        self.library.matmul(
            self.gpu.queue, w.view, self.x.data_ptr(), capi.F16, case.count, case.cols, None, capi.F16,
            self.y.data_ptr(), case.rows, case.activations, workspace.data_ptr(), self.plan.workspace_bytes,
        )  # fmt: skip

    def error(self, exact: bool = False) -> float:
        """|y - y64| / |y64| of the first matrix over up to 512 of its rows (the first, and the last), by float64."""
        torch = self.gpu.torch
        if exact:  # sixteen ones a token: every sum is an integer that fp16 holds
            self.x.zero_()
            places = torch.randint(0, self.case.cols, (self.case.count, 16), device=self.gpu.device)
            self.x.scatter_(1, places, 1.0)
        self.y.fill_(float("nan"))
        self._call(self.held[0], self.workspaces[0])
        self.gpu.synchronize()
        half = min(256, self.case.rows)
        difference = norm = 0.0
        for rows in (slice(0, half), slice(self.case.rows - half, self.case.rows)):
            expected = self.x.double() @ self.held[0].dense(self.case, rows).T
            difference += float((self.y[:, rows].double() - expected).square().sum())
            norm += float(expected.square().sum())
        return (difference / norm) ** 0.5


def dense_subject(gpu, case: Case) -> tuple[list, int]:
    """torch's fp16 F.linear (cuBLAS) over 200 MB of weights."""
    torch = gpu.torch
    count = max(2, -(-ROTATE_BYTES // (2 * case.rows * case.cols)))
    weights = [torch.empty(case.rows, case.cols, dtype=torch.float16, device=gpu.device) for _ in range(count)]
    for w in weights:
        w.normal_(std=0.02)
    x = torch.randn(case.count, case.cols, device=gpu.device).to(torch.float16)
    repeat = max(1, launches(case) // count)
    return [lambda w=w: torch.nn.functional.linear(x, w) for w in weights] * repeat, 2 * case.rows * case.cols


def unpacked_subject(gpu, library, products: Products) -> list:
    """What a caller does where the plan prefers it: fp16 weights anew for every product, and torch's."""
    torch, case = gpu.torch, products.case
    dense = torch.empty(case.rows, case.cols, dtype=torch.float16, device=gpu.device)

    def call(w: Weights) -> None:
        library.unpack(gpu.queue, w.view, 0, case.rows, dense.data_ptr(), capi.F16, case.cols)
        torch.nn.functional.linear(products.x, dense)

    return [lambda w=w: call(w) for w in products.held]


def marlin_subject(gpu, case: Case) -> list:
    """Marlin's int4 g128 product. Raises ImportError where it is not installed."""
    import marlin  # IST-DASLab/marlin, built by hand

    torch = gpu.torch
    layers = []
    for _ in range(copies(case)):
        layer = marlin.Layer(case.cols, case.rows, groupsize=case.group_size).to(gpu.device)
        layer.B.random_(-(2**31), 2**31 - 1)
        layer.s.fill_(0.01)
        layers.append(layer)
    x = torch.randn(case.count, case.cols, device=gpu.device).to(torch.float16)
    return [lambda layer=layer: layer(x) for layer in layers]


def shares(case: Case, row: dict) -> dict:
    """What a time means: GB/s, the share of the datasheet's bandwidth, of the floor, TFLOP/s."""
    found = {"bytes": moved_bytes(case)}
    if moved_bytes(case):
        found["gbps"] = moved_bytes(case) / row["us"] * 1e-3
        found["share"] = moved_bytes(case) / (row["us"] * 1e-6) / DATASHEET
        found["floor_us"] = floor_us(case)
        found["floor_share"] = floor_us(case) / row["us"]
    if operations(case):
        found["tflops"] = operations(case) / row["us"] * 1e-6
    return found


def describe(case: Case) -> dict:
    return {**dataclasses.asdict(case), "name": case.name}


def measure_matmuls(gpu, library, todo: list[Case], settings, missing: dict) -> list[dict]:
    """Rows of the products of one shape and format, with cuBLAS (and Marlin) in turn."""
    first = todo[0]
    held = [Weights(gpu, library, first, keep_codes=not i) for i in range(copies(first))]
    whole = Weights(gpu, library, first, unit_scales=True, keep_codes=True)
    rows = []
    for case in todo:
        row = {**describe(case), "subject": f"lowbit {case.format}"}
        try:
            products = Products(gpu, library, case, held)
            row |= {"kernel": products.plan.kernel.decode(), "prefers_unpack": bool(products.plan.prefers_unpack)}
            error = products.error()
            row["int8_error" if case.activations == capi.ACT_INT8 else "error"] = error
            if case.activations == capi.ACT_FLOAT:
                row["exact_error"] = Products(gpu, library, case, [whole]).error(exact=True)
            calls = products.calls() * max(1, launches(case) // len(held))
            subjects, counts = {row["name"]: gpu.graph(calls)}, {row["name"]: len(calls)}
            others = []
            if row["prefers_unpack"]:
                name = f"{row['name']} unpacked"
                subjects[name], counts[name] = gpu.graph(unpacked_subject(gpu, library, products)), len(held)
                others.append({"name": name, "subject": f"lowbit {case.format}, unpacked for cuBLAS"})
            if case.bits == 4 and case.activations == capi.ACT_FLOAT:
                dense, size = dense_subject(gpu, case)
                name = f"cublas ({case.cols},{case.rows}) M={case.count}"
                subjects[name], counts[name] = gpu.graph(dense), len(dense)
                others.append({"name": name, "subject": "torch fp16 (cuBLAS)", "bytes": size})
                if (case.cols, case.rows) == (8192, 8192):
                    try:
                        peer = marlin_subject(gpu, case)
                        name = f"marlin ({case.cols},{case.rows}) M={case.count}"
                        subjects[name], counts[name] = gpu.graph(peer), len(peer)
                        others.append({"name": name, "subject": "Marlin int4"})
                    except Exception as reason:
                        missing["marlin"] = f"{type(reason).__name__}: {reason}"
            taken = take_turns(gpu, subjects, settings.replays, settings.seconds)
            row |= summary(taken[row["name"]], counts[row["name"]])
            row |= shares(case, row)
            rows.append(row)
            for other in others:
                other |= {"cols": case.cols, "rows": case.rows, "count": case.count}
                other |= summary(taken[other["name"]], counts[other["name"]])
                other["tflops"] = operations(case) / other["us"] * 1e-6
                other["floor_share"] = floor_us(case) / other["us"]
                rows.append(other)
        except Exception as failure:  # one row's failure is that row's
            rows.append(row | {"failure": f"{type(failure).__name__}: {failure}"})
        print(line(rows[-1] if "failure" in rows[-1] else row), flush=True)
        gpu.release()
    return rows


def measure_gather(gpu, library, case: Case, settings) -> dict:
    torch = gpu.torch
    w = Weights(gpu, library, case)
    sets = 64 if case.count < 64 else 4
    ids = [torch.randint(0, case.rows, (case.count,), device=gpu.device) for _ in range(sets)]
    outs = [torch.empty(case.count, case.cols, dtype=torch.float16, device=gpu.device) for _ in range(sets)]

    def call(i, out) -> None:
        library.gather(
            gpu.queue, w.view, i.data_ptr(), capi.I64, case.count, capi.IDS_ZERO, -1, None, out.data_ptr(),
            capi.F16, case.cols,
        )  # fmt: skip

    calls = [lambda i=i, out=out: call(i, out) for i, out in zip(ids, outs, strict=True)]
    taken = take_turns(gpu, {"": gpu.graph(calls * 8)}, settings.replays, settings.seconds)
    row = summary(taken[""], 8 * len(calls))
    return describe(case) | {"subject": f"lowbit {case.format}"} | row | shares(case, row)


def measure_unpack(gpu, library, case: Case, settings) -> dict:
    torch = gpu.torch
    w = Weights(gpu, library, case)
    out = torch.empty(case.rows, case.cols, dtype=torch.float16, device=gpu.device)

    def call() -> None:
        library.unpack(gpu.queue, w.view, 0, case.rows, out.data_ptr(), capi.F16, case.cols)

    taken = take_turns(gpu, {"": gpu.graph([call] * 4)}, settings.replays, settings.seconds)
    row = summary(taken[""], 4)
    return describe(case) | {"subject": f"lowbit {case.format}"} | row | shares(case, row)


def measure_solve(gpu, library, case: Case, settings) -> dict:
    torch = gpu.torch
    weight = torch.randn(case.rows, case.cols, device=gpu.device)
    factor = torch.randn(case.cols, case.cols, device=gpu.device).mul_(0.01).triu_(1)
    factor.diagonal().fill_(1.0)
    options = capi.GptqOptions(
        format=case.bits, group_size=case.group_size, symmetric=1, clip=0, static_grids=0, scale_dtype=capi.F16
    )
    size = ctypes.c_size_t()
    library.gptq_workspace(ctypes.byref(options), case.rows, case.cols, ctypes.byref(size))
    workspace = gpu.zeroed(max(1, size.value))
    codes = torch.empty(case.rows, case.cols, dtype=torch.uint8, device=gpu.device)
    scales = torch.empty(case.rows, groups(case), device=gpu.device)
    loss = torch.empty(case.rows, dtype=torch.float64, device=gpu.device)

    def call() -> None:
        library.gptq_solve(
            gpu.queue, ctypes.byref(options), case.rows, case.cols, weight.data_ptr(), factor.data_ptr(), None,
            codes.data_ptr(), scales.data_ptr(), None, loss.data_ptr(), workspace.data_ptr(), size.value,
        )  # fmt: skip

    taken = take_turns(gpu, {"": gpu.graph([call])}, min(settings.replays, 9), settings.seconds)
    row = summary(taken[""], 1)
    return describe(case) | {"subject": f"lowbit {case.format}"} | row | shares(case, row)


def line(row: dict) -> str:
    if "failure" in row:
        return f"{row['name']:44} failed: {row['failure']}"
    share = f"{row['share']:6.1%} of 4.8 TB/s {row['floor_share']:6.1%} of the floor" if "share" in row else ""
    error = next((f"error {row[key]:.1e}" for key in ("error", "int8_error") if key in row), "")
    return f"{row['name']:44} {row['us']:10.2f} µs {share} {error} {row.get('kernel', '')}"


def measure(gpu, library, todo: list[Case], settings, keep, missing: dict) -> list[dict]:
    """All rows; keep(rows) after each set of them, so that a run that is cut short leaves what it has."""
    rows: list[dict] = []
    products: dict[tuple, list[Case]] = {}
    for case in todo:
        if case.what == "matmul":
            products.setdefault((case.bits, case.cols, case.rows, case.group_size), []).append(case)
    for cases_of_shape in products.values():
        rows += measure_matmuls(gpu, library, cases_of_shape, settings, missing)
        gpu.release()
        keep(rows)
    others = {"gather": measure_gather, "unpack": measure_unpack, "solve": measure_solve}
    for case in todo:
        if case.what not in others:
            continue
        try:
            rows.append(others[case.what](gpu, library, case, settings))
        except Exception as failure:
            rows.append(describe(case) | {"failure": f"{type(failure).__name__}: {failure}"})
        print(line(rows[-1]), flush=True)
        gpu.release()
        keep(rows)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression over the rows' names")
    parser.add_argument("--out", help="folder of the results; default: bench/results/<gpu>")
    parser.add_argument("--replays", type=int, default=41, help="of each graph")
    parser.add_argument("--seconds", type=float, default=1.5, help="after which a row ends, once it has 5 replays")
    parser.add_argument("--table", metavar="JSON", help="only print the table of figures of a result file")
    parser.add_argument("--write", metavar="FILE", help="put the table between this file's markers")
    settings = parser.parse_args()
    if settings.table:
        contents = harness.load(settings.table) if settings.table != "none" else None
        text = figures_table(contents) + (f"\n\n<sub>{origin(contents)}</sub>" if contents else "")
    else:
        contents = run(settings)
        text = figures_table(contents) + f"\n\n<sub>{origin(contents)}</sub>"
    if settings.write:
        path = Path(settings.write)
        path.write_text(replace_between(path.read_text(), text))
    print(text)
    if contents and any("failure" in row for row in contents["rows"]):
        sys.exit(1)


def run(settings) -> dict:
    """Measures; writes <out>/gpu.json as it goes."""
    import torch

    before = card()
    out = Path(settings.out) if settings.out else harness.RESULTS / slug(before["gpu"])
    out.mkdir(parents=True, exist_ok=True)
    library, gpu, missing = capi.Library(), Gpu(), {}
    probe = {}
    if (out / "probe.json").is_file():
        probe = read_probe((out / "probe.json").read_text())
    elif program := find_probe():
        subprocess.run([str(program), str(out / "probe.json")], check=False)
        probe = read_probe((out / "probe.json").read_text()) if (out / "probe.json").is_file() else {}
    else:
        missing["gpu_probe"] = "not built: make gpu STAGE=build"
    versions = {"lowbit": library.version(), "torch": torch.__version__, "cuda": torch.version.cuda or "none"}
    properties = torch.cuda.get_device_properties(0)
    machine = before | {
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": getattr(properties, "L2_cache_size", 0),
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "architectures": library.architectures(),
    }
    todo = [case for case in cases() if re.search(settings.only, case.name)]

    def document(rows: list[dict]) -> dict:
        contents = harness.document(
            "gpu", {"replays": settings.replays, "seconds": settings.seconds}, versions, missing, rows, {}
        )
        host = contents["machine"]
        contents["machine"] = machine | {"host": host, "clocks_after": card()["clocks"]}
        if "LOWBIT_COMMIT" in os.environ:  # of a copy of the tree that came without its .git
            contents["commit"] = os.environ["LOWBIT_COMMIT"]
        return contents | {"probe": probe}

    def keep(rows: list[dict]) -> None:
        harness.save(document(rows), out / "gpu.json")

    torch.manual_seed(1)
    rows = measure(gpu, library, todo, settings, keep, missing)
    keep(rows)
    return document(rows)


if __name__ == "__main__":
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    main()
