"""The GPU benchmark's pure parts: bytes, floors, figures, what nvidia-smi says; and its rows on the emulated device."""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"
sys.path[:0] = [str(BENCH), str(ROOT / "tests/gpu")]

import capi  # noqa: E402
import gpu  # noqa: E402
import harness  # noqa: E402
import stages  # noqa: E402

HEADER = (ROOT / "csrc/include/lowbit/lowbit.h").read_text()


# ---- sizes and floors ----

# µs on an H200, int4 g128 with fp16 scales: bytes at 4.8 TB/s, or operations at 790 TFLOP/s.
FLOORS = {
    (4096, 4096): (1.81, 1.86, 2.72, 10.9, 174),
    (4096, 12288): (5.41, 5.52, 8.16, 32.6, 522),
    (8192, 28672): (25.2, 25.5, 38.1, 152, 2436),
    (4096, 128256): (56.5, 57.3, 85, 340, 5448),
}


@pytest.mark.parametrize("shape", FLOORS)
def test_floors_of_int4(shape):
    found = [gpu.floor_us(gpu.Case("matmul", 4, *shape, tokens)) for tokens in gpu.TOKENS]
    assert found == pytest.approx(FLOORS[shape], rel=0.02)


@pytest.mark.parametrize("bits, expected", [(8, 49.7), (3, 19.1), (2, 13.0)])
def test_floors_of_other_widths(bits, expected):
    assert gpu.floor_us(gpu.Case("matmul", bits, 8192, 28672)) == pytest.approx(expected, rel=0.02)


def test_trit_counts_its_own_bytes():
    case = gpu.Case("matmul", capi.TRIT, 8192, 28672, group_size=-1)
    assert gpu.weight_bytes(case) == 28672 * (26 * 64 + 2)


def test_lines_are_the_librarys():
    library = built_library()
    for bits in (capi.TRIT, 2, 3, 4, 8):
        for cols in (1, 64, 65, 256, 257, 320, 321, 511, 512, 513, 4096, 8192):
            assert 64 * gpu.row_lines(bits, cols) == library.row_bytes(bits, cols), (bits, cols)


def test_every_case_rotates_through_200_mb():
    for case in gpu.cases():
        if case.what == "matmul":
            assert gpu.copies(case) >= 2
            assert gpu.copies(case) * gpu.weight_bytes(case) >= gpu.ROTATE_BYTES
            assert gpu.launches(case) % gpu.copies(case) == 0
    assert len({case.name for case in gpu.cases()}) == len(gpu.cases())


def test_gather_counts_both_ways():
    case = gpu.Case("gather", 4, 4096, 128256, 8192)
    assert gpu.moved_bytes(case) == 8192 * (2048 + 2 * 32 + 2 * 4096 + 8)
    assert gpu.moved_bytes(gpu.Case("solve", 4, 64, 64)) == 0


# ---- the figures to reach ----


def contents(rows: list[dict], probe: dict | None = None) -> dict:
    machine = {"gpu": "NVIDIA H200", "driver": "580.1", "clocks": {"clocks.sm": "1980"}}
    return {
        "schema": harness.SCHEMA, "bench": "gpu", "date": "2026-11-22T10:00:00+00:00", "commit": "0123456789ab",
        "dirty": False, "machine": machine, "settings": {}, "versions": {"torch": "2.11"},
        "not_installed": {"marlin": "no"}, "rows": rows, "probe": probe or {},
    }  # fmt: skip


def verdicts(text: str) -> dict[str, str]:
    return {cells[1]: cells[3] for line in text.splitlines()[2:] if (cells := [c.strip() for c in line.split("|")])}


def test_without_results_no_figure_is_measured():
    table = verdicts(gpu.figures_table(None))
    assert len(table) == len(gpu.figures()) > 30
    assert set(table.values()) == {"not measured"}


def test_every_figure_reads_a_row_that_is_measured():
    """Rows of all cases, each at its floor: every figure has a value."""
    rows = []
    for case in gpu.cases():
        row = gpu.describe(case) | {"us": gpu.floor_us(case) or 1000.0}
        if case.what == "matmul":
            row |= {"error": 1e-4, "exact_error": 0.0}
            rows.append({"name": f"cublas ({case.cols},{case.rows}) M={case.count}", "us": row["us"] * 3.5})
        rows.append(row | gpu.shares(case, row))
    rows.append({"name": "marlin (8192,8192) M=1", "us": 1e9})
    probe = {"read": 4.5, "mma.sync fp16": 600, "mma.sync u8s8": 1200, "fp16 subnormals, 4 bits at 4": 0.0}
    table = verdicts(gpu.figures_table(contents(rows, probe)))
    assert "not measured" not in table.values()
    assert table["error where integers make a product exact"] == "0.0e+00, reached"
    assert table["int4 g128, (8192, 28672), 1 tokens: share of 4.8 TB/s"] == "100%, reached"
    assert table["int4 g128, (8192, 28672), 16 tokens, against cuBLAS fp16"] == "3.50×, reached"
    assert "µs" in table["GPTQ solver, 4096 × 4096, int4 g128"]


def test_a_figure_missed_says_so():
    rows = [{"name": "matmul int4 (4096,4096) M=1", "us": 4.7, "error": 3e-3}]
    table = verdicts(gpu.figures_table(contents(rows)))
    assert table["int4 g128, (4096, 4096), 1 tokens, in a graph"] == "4.70 µs, **not reached**"
    assert table["error of a product with fp16 activations, worst of the above"].endswith("**not reached**")


def test_where_the_plan_prefers_unpacking_that_row_counts():
    rows = [
        {"name": "matmul int4 (8192,28672) M=4096", "us": 9000.0, "tflops": 200, "prefers_unpack": True},
        {"name": "matmul int4 (8192,28672) M=4096 unpacked", "us": 2700.0, "tflops": 712},
        {"name": "cublas (8192,28672) M=4096", "us": 2500.0},
    ]
    table = verdicts(gpu.figures_table(contents(rows)))
    assert table["int4 g128, (8192, 28672), 4096 tokens, against cuBLAS fp16"] == "93%, reached"
    assert table["int4 g128, (8192, 28672), 4096 tokens: rate"] == "712 TFLOP/s, reached"


def test_the_committed_table_is_the_scripts():
    """results/README.md names every figure, as `bench/gpu.py --write` renders it."""
    text = (BENCH / "results/README.md").read_text()
    found = text[text.index(gpu.BEGIN) + len(gpu.BEGIN) : text.index(gpu.END)].strip()
    results = sorted((BENCH / "results").glob("nvidia-*/gpu.json"))
    assert found.startswith(gpu.figures_table(harness.load(results[-1]) if results else None))


def test_committed_results_are_readable():
    for path in sorted((BENCH / "results").glob("nvidia-*/gpu.json")):
        found = harness.load(path)
        assert path.parent.name == gpu.slug(found["machine"]["gpu"])
        assert gpu.origin(found) and verdicts(gpu.figures_table(found))


def test_replace_between_needs_its_markers():
    text = f"a\n{gpu.BEGIN}\nold\n{gpu.END}\nb"
    assert gpu.replace_between(text, "new") == f"a\n{gpu.BEGIN}\nnew\n{gpu.END}\nb"
    with pytest.raises(ValueError, match="expected one"):
        gpu.replace_between("nothing", "new")


def test_origin_names_card_driver_commit_and_what_was_missing():
    text = gpu.origin(contents([]))
    for word in ("NVIDIA H200", "580.1", "2026-11-22", "012345678", "marlin", "1980"):
        assert word in text


# ---- the card ----

SMI = "NVIDIA H200, 580.159.04, 9.0, 345, 3201, 1980, 3201, 700.00, 31\n"


def test_what_nvidia_smi_says():
    found = gpu.card(SMI)
    assert found["gpu"] == "NVIDIA H200" and found["driver"] == "580.159.04"
    assert found["clocks"]["clocks.sm"] == "345" and found["clocks"]["temperature.gpu"] == "31"
    assert gpu.slug(found["gpu"]) == "nvidia-h200"


@pytest.mark.parametrize("capability, expected", [("9.0", "90a-real"), ("8.9", "89-real"), ("10.0", "100-real")])
def test_the_architecture_of_the_card_at_hand(capability, expected):
    assert gpu.architecture(capability) == expected


def test_the_probes_figures():
    text = json.dumps({"gpu": "x", "figures": [{"name": "read", "value": 4.3, "unit": "TB/s"}]})
    assert gpu.read_probe(text) == {"read": 4.3}


# ---- compute-sanitizer ----

SANITIZED = [
    ("========= ERROR SUMMARY: 0 errors\n", 0),
    ("========= ERROR SUMMARY: 3 errors\n", 3),
    ("========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n", 2),
    ("========= Error: Device not supported.\n", None),
]


@pytest.mark.parametrize("text, errors", SANITIZED)
def test_what_compute_sanitizer_counted(text, errors):
    assert stages.errors_of(text) == errors


# ---- the C API ----


def built_library() -> capi.Library:
    lowbit = pytest.importorskip("lowbit")
    return capi.Library(Path(lowbit.__file__).parent / "lib/liblowbit.so.0")


def header_fields(struct: str) -> list[str]:
    body = re.search(rf"typedef struct {struct} {{(.*?)}} {struct};", HEADER, re.S).group(1)
    fields = []
    for declaration in re.sub(r"/\*.*?\*/", "", body, flags=re.S).split(";"):
        if declaration.strip():
            fields += [re.search(r"(\w+)(\[\d+\])?$", name.strip()).group(1) for name in declaration.split(",")]
    return fields


@pytest.mark.parametrize("struct, mirror", [
    ("lowbit_matrix", capi.Matrix), ("lowbit_cuda_queue", capi.Queue), ("lowbit_cuda_device", capi.Device),
    ("lowbit_cuda_plan", capi.Plan), ("lowbit_gptq_options", capi.GptqOptions),
])  # fmt: skip
def test_structures_are_the_headers(struct, mirror):
    assert header_fields(struct) == [name for name, _ in mirror._fields_]


@pytest.mark.parametrize("name", capi.SIGNATURES)
def test_signatures_are_the_headers(name):
    declared = re.search(rf"LOWBIT_API lowbit_status {name}\((.*?)\);", HEADER, re.S).group(1)
    kinds = {"size_t": ctypes.c_size_t, "int64_t": ctypes.c_int64, "int32_t": ctypes.c_int32}
    arguments = [" ".join(argument.split()) for argument in declared.split(",")]
    assert len(arguments) == len(capi.SIGNATURES[name])
    for argument, mirror in zip(arguments, capi.SIGNATURES[name], strict=True):
        if "*" in argument:
            assert mirror is ctypes.c_void_p or issubclass(mirror, ctypes._Pointer), argument
        else:
            kind = argument.split()[-2]
            assert mirror is kinds.get(kind, ctypes.c_int), argument  # enums and int


def test_plans_of_the_benchmark_on_an_h200():
    """Pure arithmetic of the library: what each product would run there."""
    library = built_library()
    h200 = capi.Device(b"NVIDIA H200", 90, 132, 227 << 10, 228 << 10, 13000, 13000)
    kernels = {}
    for case in gpu.cases():
        if case.what == "matmul":
            w = capi.Matrix(
                case.bits, case.rows, case.cols, case.group_size if case.group_size > 0 else case.cols, 64, 64,
                capi.F16, case.rows, gpu.groups(case), None, None,
            )  # fmt: skip
            plan = library.plan(h200, w, case.count, capi.F16, case.activations)
            kernels[case.name] = plan.kernel.decode()
            assert plan.zeroed_bytes <= plan.workspace_bytes
    assert kernels["matmul int4 (8192,28672) M=1"] == "int4_decode"
    assert kernels["matmul int4 (8192,28672) M=64"] == "int4_tile"
    assert kernels["matmul trit (8192,28672) M=1"] == "trit_integer"


# ---- every row, on the emulated device ----

EMULATED = [ROOT / "build" / name / "tests/emulation/liblowbit_cuda_emulated.so" for name in ("dev", "wheel")]

ROWS = """
import json, sys, time
sys.path.insert(0, {bench!r})
import torch
import capi, gpu

class Emulated:
    torch, device, queue = torch, "cpu", capi.Queue(0, None)
    def graph(self, calls): return lambda: [call() for call in calls]
    def seconds(self, run):
        begin = time.perf_counter(); run(); return time.perf_counter() - begin
    def zeroed(self, size):
        memory = torch.zeros(size + 256, dtype=torch.uint8)
        start = -memory.data_ptr() % 256
        return memory[start : start + size]
    def synchronize(self): pass
    def release(self): pass

class Settings:
    replays, seconds = 5, 0.0

gpu.copies = lambda case: 2
gpu.launches = lambda case: 2
gpu.dense_subject = lambda machine, case: ([lambda: None], 1)
cases = [gpu.Case("matmul", 4, 300, 40, tokens) for tokens in (1, 20)]
cases += [gpu.Case("matmul", bits, 300, 40) for bits in (8, 3, 2)]
cases += [gpu.Case("matmul", capi.TRIT, 300, 40, group_size=-1)]
cases += [gpu.Case("matmul", 4, 300, 40, 2, activations=capi.ACT_INT8), gpu.Case("matmul", 4, 300, 40, 400)]
cases += [gpu.Case("gather", 4, 300, 40, 5), gpu.Case("unpack", 8, 300, 40), gpu.Case("solve", 4, 128, 16)]
missing, kept = {{}}, []
torch.manual_seed(1)
rows = gpu.measure(Emulated(), capi.Library({library!r}), cases, Settings, kept.append, missing)
print("ROWS" + json.dumps(rows))
"""


def test_every_kind_of_row_on_the_emulated_device():
    lowbit = pytest.importorskip("lowbit")
    emulated = next((path for path in EMULATED if path.is_file()), None)
    if emulated is None:
        pytest.skip("the emulated device is built with the C++ tests: make dev")
    library = Path(lowbit.__file__).parent / "lib/liblowbit.so.0"
    done = subprocess.run(
        [sys.executable, "-c", ROWS.format(bench=str(BENCH), library=str(library))],
        capture_output=True,
        text=True,
        env={**os.environ, "LOWBIT_CUDA_LIBRARY": str(emulated), "LOWBIT_EMULATED_ARCH": "90"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout.split("ROWS")[1])}
    assert [row["failure"] for row in rows.values() if "failure" in row] == []
    for name, row in rows.items():
        if name.startswith("matmul") and not name.endswith("unpacked"):
            assert row.get("error", 0) < 2e-3 and row.get("int8_error", 0) < 2e-2, row
            assert row.get("exact_error", 0) == 0, row
    assert rows["matmul int4 (300,40) M=20"]["kernel"] == "int4_tile"
    assert rows["matmul int4 (300,40) M=400"]["prefers_unpack"]
    assert rows["matmul int4 (300,40) M=400 unpacked"]["us"] > 0
    assert rows["cublas (300,40) M=1"]["us"] > 0
    assert rows["gather int4 (300,40) ids=5"]["share"] > 0
