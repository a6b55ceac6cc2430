"""What the compiler made of every GPU kernel: registers, spills, and the instructions of the main loops, with no GPU.

    python bench/sass.py                         decode and tile kernels of the newest architecture built
    python bench/sass.py --arch 80 --only 'int4 .* plane'
    python bench/sass.py --against old/liblowbit_cuda.so --only int4     two builds, loop by loop
    python bench/sass.py --show 'decode int4 fp16 x8 plane'              the common path, instruction by instruction

It reads liblowbit_cuda.so (build/wheel, build/dev, build/gpu, the installed package, or LOWBIT_CUDA_BUILT) with
cuobjdump and nvdisasm: on PATH, in CUDA's bin, or in the triton wheel (pip install triton, or
LOWBIT_CUDA_TOOLS=folder). tests/python/test_cuda_build.py gates what is read here.

How a main loop is counted. The main loop is the smallest loop of a kernel's control flow graph that holds both
tensor-core instructions and copies of 16 bytes into shared memory (sm_75: STS.128): one unit of 16 rows a warp. Its
common path runs from the head back to the head through all copies, mma and reads of shared memory that one path can
take, and is otherwise the shortest: rare branches (the next tile's addresses, a group size that is no power of two)
stay outside. Loops within it are counted once and the figure has a star (finer groups run theirs four times). A
predicated instruction is counted: it takes its issue slot.

The budget (--bandwidth, --clock, --multiprocessors): at 4.8 TB/s, 132 multiprocessors and 1.7 GHz a KB of weights
passes every 47.9 cycles of a multiprocessor: 191 issue slots, 95 on each half-rate pipe (ALU: LOP3, SHF, PRMT,
IADD3...; IMAD), and 47.9 reads or writes of 128 bytes of shared memory. `issue`, `alu`, `imad` and `shared` are what
the loop takes of each: where one is above 1 it binds, and not the bytes. `tensor` is what the loop leaves possible of
the dense rate of the tensor cores (an m16n8k16 every 4 cycles of a scheduler), which is what counts at many tokens.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = "liblowbit_cuda.so.0"
TRIT = 1
LINES = {8: 1, 4: 1, 2: 1, 3: 3, TRIT: 1}  # of 64 bytes, of a unit of one row (csrc/cuda/matmul_plan.h)
PLANES = {8: 1, 4: 2, 2: 4, 3: 8, TRIT: 5}


class Unavailable(RuntimeError):
    """There is no library to read, or nothing to read it with; the message says which."""


# ---- the library and the tools ----


def find_library(given: str | None = None) -> Path:
    """The liblowbit_cuda.so that this machine built. Raises Unavailable."""
    given = given or os.environ.get("LOWBIT_CUDA_BUILT")
    if given:
        path = Path(given)
        if path.is_dir():
            path = path / LIBRARY
        if not path.is_file():
            raise Unavailable(f"{given}: no such library")
        return path
    built = [ROOT / "build" / name / "csrc/cuda" / LIBRARY for name in ("wheel", "dev", "gpu")]
    built.append(ROOT / "python/lowbit/lib" / LIBRARY)
    found = [path for path in built if path.is_file()]
    if not found:
        why = "was not built yet" if shutil.which("nvcc") else "is built where nvcc is found: this machine has none"
        raise Unavailable(f"{LIBRARY} {why} (looked in build/wheel, build/dev, build/gpu, python/lowbit/lib)")
    return max(found, key=lambda path: path.stat().st_mtime)


def find_tools() -> tuple[str, str]:
    """cuobjdump and nvdisasm. Raises Unavailable."""
    folders = [os.environ.get("LOWBIT_CUDA_TOOLS", ""), *os.environ["PATH"].split(os.pathsep)]
    folders += [os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")]
    triton = importlib.util.find_spec("triton")
    if triton and triton.submodule_search_locations:
        folders += [os.path.join(place, "backends/nvidia/bin") for place in triton.submodule_search_locations]
    for folder in filter(None, folders):
        tools = [shutil.which(name, path=folder) for name in ("cuobjdump", "nvdisasm")]
        if all(tools):
            return os.path.abspath(tools[0]), os.path.abspath(tools[1])
    raise Unavailable("neither CUDA's bin nor the triton wheel (pip install triton) has cuobjdump and nvdisasm here")


def _run(*command: str, cwd: str | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return done.stdout


# ---- names ----


@dataclass(frozen=True)
class Kernel:
    """Which instantiation a mangled name is. Products carry their template arguments; of the others, the family."""

    family: str  # "decode", "tile", "plain", "gather_rows" ...
    bits: int = 0
    input: str = ""  # "fp16", "bf16", "int8", "int8x2" (two digits)
    token_tiles: int = 0
    row_tiles: int = 1
    scales: str = ""  # "unit", "pair", "plane", "fine", "whole"
    detail: str = ""

    @property
    def name(self) -> str:
        fmt = {0: "", TRIT: "trit"}.get(self.bits, f"int{self.bits}")
        tokens = f"x{8 * self.token_tiles}" if self.token_tiles else ""
        rows = f"{16 * self.row_tiles} rows" if self.row_tiles > 1 else ""
        return " ".join(filter(None, (self.family, fmt, self.input, tokens, self.scales, rows, self.detail)))

    @property
    def is_product(self) -> bool:
        return self.family in ("decode", "tile")

    @property
    def resident(self) -> int:
        """Blocks of 256 threads that a multiprocessor is to hold: resident_blocks of csrc/cuda/matmul_plan.h."""
        if self.family != "decode" or self.bits == 3:
            return 1
        if self.bits == TRIT:
            return 1 if self.token_tiles == 2 or self.scales == "plane" else 2
        return 1 if self.bits == 2 and self.token_tiles == 2 and not self.input.startswith("int8") else 2

    @property
    def unit_bytes(self) -> int:
        """Bytes of codes that one pass of the main loop multiplies, of one warp."""
        return 16 * 64 * LINES[self.bits] * self.row_tiles


_SCALES = ("unit", "plane", "fine", "pair")
_SPANS = ("whole", "plane", "fine")
_FLOAT = re.compile(r"6decodeINS\d?_12FloatProductILi(\d+)ELb(\d)ELi(\d+)ELNS\d?_6ScalesE(\d)E")
_INTEGER = re.compile(r"6decodeINS\d?_14IntegerProductILi(\d+)ELi(\d+)ELi(\d+)ELNS\d?_5SpansE(\d)E")
_TILE = re.compile(r"4tileILi(\d+)ELb(\d)ELi(\d+)ELi(\d+)ELNS\d?_6ScalesE(\d)E")
_DTYPES = {"0": "fp32", "1": "fp16", "2": "bf16"}


def kernel_of(mangled: str) -> Kernel:
    """The kernel of a mangled name."""
    if found := _FLOAT.search(mangled):
        bits, bf16, tiles, scales = map(int, found.groups())
        return Kernel("decode", bits, ("fp16", "bf16")[bf16], tiles, scales=_SCALES[scales])
    if found := _INTEGER.search(mangled):
        bits, digits, tiles, spans = map(int, found.groups())
        return Kernel("decode", bits, "int8" if digits == 1 else "int8x2", tiles, scales=_SPANS[spans])
    if found := _TILE.search(mangled):
        bits, bf16, rows, tiles, scales = map(int, found.groups())
        return Kernel("tile", bits, ("fp16", "bf16")[bf16], tiles, rows, _SCALES[scales])
    # _ZN 6lowbit 4cuda [12_GLOBAL__N_...] 11gather_rows I Li4E L12lowbit_dtype1E E ...
    rest, last = re.sub(r"^_ZN", "", mangled), ""
    while found := re.match(r"\d+", rest):
        length = int(found.group())
        last, rest = rest[found.end() : found.end() + length], rest[found.end() + length :]
    arguments = re.match(r"I(.*?)E[Ev]", rest)
    found_bits = re.match(r"ILi(\d+)E", rest)
    dtype = re.search(r"^I.*?12lowbit_dtype(\d)E", rest)
    flag = re.match(r"ILb(\d)E", rest) if arguments else None
    detail = _DTYPES.get(dtype.group(1), "") if dtype else ("", "bf16")[int(flag.group(1))] if flag else ""
    return Kernel(last or mangled, int(found_bits.group(1)) if found_bits else 0, detail=detail)


# ---- instructions and loops ----


@dataclass
class Instruction:
    predicate: str
    op: str  # with its modifiers: "LDS.128"
    operands: str

    @property
    def base(self) -> str:
        return self.op.split(".", 1)[0]

    @property
    def never(self) -> bool:
        """Issued for its slot alone: ptxas puts three `@!PT LDS RZ, [RZ]` before an LDGSTS."""
        return self.predicate == "@!PT"

    def __str__(self) -> str:
        return f"{self.predicate + ' ' if self.predicate else ''}{self.op} {self.operands}".strip()


_LINE = re.compile(r"/\*[0-9a-f]+\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*)")
_LABEL = re.compile(r"^(\.L_x_\w+):")
_TARGET = re.compile(r"`\((\.L_x_\w+)\)")
_TARGETS = re.compile(r"BRANCH_TARGETS ([^\"]+)")  # of a jump table, as nvdisasm found them
_BARRIER = re.compile(r"\bB\d+\b")


class Code:
    """A kernel's instructions, its control flow graph and its natural loops."""

    def __init__(self, lines: list[str]):
        self.instructions: list[Instruction] = []
        labels: dict[str, int] = {}
        for line in lines:
            if found := _LABEL.match(line):
                labels[found.group(1)] = len(self.instructions)
            elif "/*" in line and (found := _LINE.search(line)):
                self.instructions.append(Instruction(found.group(1) or "", found.group(2), found.group(3).rstrip(" ;")))
        self._blocks(labels)

    def _blocks(self, labels: dict[str, int]) -> None:
        code = self.instructions
        meets: dict[str, set[int]] = {}  # where each convergence barrier is met
        for i in code:
            if i.base == "BSSY":
                barrier, target = _BARRIER.search(i.operands), _TARGET.search(i.operands)
                if barrier and target and target.group(1) in labels:
                    meets.setdefault(barrier.group(), set()).add(labels[target.group(1)])
        after: list[list[int]] = []
        for at, i in enumerate(code):
            on = [at + 1] if at + 1 < len(code) else []
            target = _TARGET.search(i.operands)
            to = [labels[target.group(1)]] if target and target.group(1) in labels else []
            if i.base in ("BRA", "JMP"):
                condition = i.operands.replace(target.group(), "").strip(" ,") if target else ""
                always = i.predicate in ("", "@PT", "@!UPT") and not condition and ".DIV" not in i.op
                on = to if always and to else on + to
            elif i.base in ("EXIT", "RET", "BRX", "BRXU", "JMX", "KILL") and not i.predicate:
                table = _TARGETS.search(i.operands)
                on = [labels[name.strip()] for name in table.group(1).split(",")] if table else []
            elif i.base == "BSYNC":
                barrier = _BARRIER.search(i.operands)
                known = meets.get(barrier.group(), set()) if barrier else set()
                on = on if not known or known & set(on) or i.predicate else sorted(known)
            elif i.base in ("WARPSYNC", "CALL") and to:
                on = on + to  # sm_80 leaves a loop by a predicated CALL to a label
            after.append([n for n in on if n < len(code)])
        starts = {0, *labels.values()} | {n for at, on in enumerate(after) if on != [at + 1] for n in [at + 1, *on]}
        self.starts = sorted(s for s in starts if s < len(code))
        index = {start: number for number, start in enumerate(self.starts)}
        ends = [*self.starts[1:], len(code)]
        self.blocks = [range(s, e) for s, e in zip(self.starts, ends, strict=True)]
        self.next = [[index[n] for n in after[block[-1]] if n in index] for block in self.blocks]

    @functools.cached_property
    def loops(self) -> list[tuple[int, frozenset[int]]]:
        """Natural loops (head, blocks), loops of one head joined; smallest first."""
        order: list[int] = []
        seen: set[int] = set()
        stack: list[tuple[int, int]] = [(0, 0)] if self.blocks else []
        seen.update({0} if self.blocks else set())
        while stack:
            block, child = stack.pop()
            if child < len(self.next[block]):
                stack.append((block, child + 1))
                to = self.next[block][child]
                if to not in seen:
                    seen.add(to)
                    stack.append((to, 0))
            else:
                order.append(block)
        order.reverse()
        rank = {block: at for at, block in enumerate(order)}
        before: dict[int, list[int]] = {block: [] for block in order}
        for block in order:
            for to in self.next[block]:
                before[to].append(block)
        above: dict[int, int] = {0: 0} if order else {}  # immediate dominators (Cooper, Harvey, Kennedy)
        changed = True
        while changed:
            changed = False
            for block in order[1:]:
                known = [b for b in before[block] if b in above]
                new = known[0]
                for other in known[1:]:
                    while new != other:
                        while rank[new] > rank[other]:
                            new = above[new]
                        while rank[other] > rank[new]:
                            other = above[other]
                if above.get(block) != new:
                    above[block], changed = new, True

        def dominates(a: int, b: int) -> bool:
            while rank[b] > rank[a]:
                b = above[b]
            return a == b

        loops: dict[int, set[int]] = {}
        for block in order:
            for head in self.next[block]:
                if dominates(head, block):
                    body, todo = loops.setdefault(head, {head}), [block]
                    while todo:
                        inside = todo.pop()
                        if inside not in body:
                            body.add(inside)
                            todo += before[inside]
        return sorted(((h, frozenset(b)) for h, b in loops.items()), key=lambda loop: len(self.inside(loop[1])))

    def inside(self, blocks) -> list[Instruction]:
        return [self.instructions[at] for block in sorted(blocks) for at in self.blocks[block]]

    @property
    def looped(self) -> list[Instruction]:
        """All instructions that lie in some loop."""
        return self.inside(frozenset().union(*(body for _, body in self.loops)) if self.loops else ())

    def main_loop(self) -> tuple[int, frozenset[int]] | None:
        """The smallest loop with tensor-core instructions and 16-byte copies into shared memory."""
        for head, body in self.loops:
            code = self.inside(body)
            if any(is_mma(i) for i in code) and any(is_copy(i) for i in code):
                return head, body
        return None

    def common_path(self, head: int, body: frozenset[int]) -> list[Instruction]:
        """From the head to a jump back to it; see the top of this file."""
        worth = {
            block: sum(10_000 * (is_mma(i) or is_copy(i) or i.base in ("LDGSTS", "LDS")) for i in code if not i.never)
            - len(code)
            for block in body
            for code in [self.inside([block])]
        }
        order: list[int] = []
        state: dict[int, int] = {}
        forward: dict[int, list[int]] = {}

        def visit(block: int) -> None:
            state[block] = 1
            # A retreating edge is a jump back, of this loop or of one inside it.
            forward[block] = [to for to in self.next[block] if to in body and to != head and state.get(to) != 1]
            for to in list(forward[block]):
                if to not in state:
                    visit(to)
            state[block] = 2
            order.append(block)

        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(max(limit, 10_000))
        visit(head)
        sys.setrecursionlimit(limit)
        best: dict[int, tuple[int, int | None]] = {}
        for block in order:  # ends first
            ways = [(best[to][0], to) for to in forward[block] if to in best]
            if head in self.next[block]:
                ways.append((0, None))
            if ways:
                value, to = max(ways, key=lambda way: way[0])
                best[block] = (value + worth[block], to)
        path, at = [], head
        while at is not None:
            path.append(at)
            at = best[at][1]
        return [self.instructions[n] for block in path for n in self.blocks[block]]


def is_mma(i: Instruction) -> bool:
    return i.base in ("HMMA", "IMMA", "HGMMA", "IGMMA")


def is_copy(i: Instruction) -> bool:
    """Sixteen bytes on their way into shared memory."""
    return i.base in ("LDGSTS", "STS") and ".128" in i.op


# Which unit an instruction keeps busy (Ampere, Hopper). ALU and IMAD take a warp's instruction every other cycle.
_ALU = frozenset(
    (
        *("IADD3", "IADD", "LOP3", "LOP", "SHF", "PRMT", "LEA", "SEL", "ISETP", "FSETP", "IMNMX", "VIMNMX", "FMNMX"),
        *("FSEL", "PLOP3", "IABS", "VABSDIFF", "BMSK", "SGXT", "MOV", "FLO", "P2R", "R2P", "CS2R", "I2FP", "VIADD"),
        *("VIADDMNMX", "VOTE"),
    )
)
_XU = frozenset(("I2F", "F2I", "F2F", "MUFU", "POPC", "BREV", "FRND"))
_SHARED = {".128": 4, ".64": 2}


def pipe_of(i: Instruction) -> str:
    if i.never:
        return "control"
    if is_mma(i):
        return "mma"
    if i.base in ("IMAD", "IDP", "IDP4A", "IMUL"):
        return "imad"
    if i.base in _ALU:
        return "alu"
    if i.base in _XU:
        return "xu"
    if i.base in ("FFMA", "FMUL", "FADD", "HFMA2", "HADD2", "HMUL2", "FSWZADD"):
        return "fma"
    if i.base in ("LDS", "STS", "LDSM", "LDGSTS", "LDG", "STG", "LDC", "ATOMS", "SHFL"):
        return "memory"
    if i.base.startswith("U") or i.base in ("R2UR", "S2UR"):
        return "uniform"
    return "control"


def shared_cycles(i: Instruction) -> int:
    """Cycles of 128 bytes of shared memory that a whole warp takes, without conflicts, broadcasts counted in full."""
    if i.base in ("LDS", "STS", "LDGSTS") and not i.never:
        return next((cycles for width, cycles in _SHARED.items() if width in i.op), 1)
    return 4 if i.base == "LDSM" and ".4" in i.op else 0


# ---- what is read ----


@dataclass
class Report:
    """One kernel for one architecture."""

    kernel: Kernel
    arch: str  # "75", "90a"
    registers: int
    stack: int
    shared: int  # static
    local: int
    ops: Counter = field(default_factory=Counter)  # instructions, by name without modifiers
    looped: Counter = field(default_factory=Counter)  # of them, those in loops (of a product)
    path: list[Instruction] = field(default_factory=list)  # the main loop's common path
    inner: int = 0  # loops within the main loop

    def count(self, *bases: str) -> int:
        return sum(i.base in bases and not i.never for i in self.path)

    @property
    def pipes(self) -> Counter:
        return Counter(pipe_of(i) for i in self.path)

    @property
    def kilobytes(self) -> float:
        return self.kernel.unit_bytes / 1024

    @property
    def shared_cycles(self) -> int:
        return sum(map(shared_cycles, self.path))

    @property
    def tensor(self) -> float:
        """Share of the tensor cores' rate that the loop leaves possible: an m16n8k16 takes 4 cycles at sm_90's."""
        pipes = self.pipes
        cycles = max(len(self.path), 2 * pipes["alu"], 2 * pipes["imad"], 4 * self.shared_cycles, 4 * pipes["mma"])
        return 4 * pipes["mma"] / cycles

    @property
    def spills(self) -> int:
        """Loads and stores of local memory, anywhere in the kernel."""
        return self.ops["STL"] + self.ops["LDL"]

    @property
    def spills_in_loop(self) -> int:
        """Of them, those on the main loop's common path."""
        return self.count("STL", "LDL")

    @property
    def copies_lead(self) -> bool:
        """Whether every 16-byte copy of the path comes before its first mma."""
        marks = [(is_copy(i), is_mma(i)) for i in self.path if is_copy(i) or is_mma(i)]
        first = next((at for at, (_, mma) in enumerate(marks) if mma), len(marks))
        return first > 0 and not any(copy for copy, _ in marks[first:])


_RESOURCES = re.compile(
    r"^arch = sm_(?P<arch>\w+)|^ Function (?P<name>\S+):\s*$|REG:(?P<reg>\d+) STACK:(?P<stack>\d+) "
    r"SHARED:(?P<shared>\d+) LOCAL:(?P<local>\d+)"
)


def resources(text: str) -> list[tuple[int, str, str, dict[str, int]]]:
    """(number of the ELF file, architecture, mangled name, figures) of `cuobjdump -res-usage`'s output."""
    found, elf, arch, name, ptx = [], 0, "", "", False
    for line in text.splitlines():
        if line.startswith("Fatbin ptx code"):
            ptx = True
        elif line.startswith("Fatbin elf code"):
            elf, ptx = elf + 1, False
        elif not ptx and (m := _RESOURCES.search(line)):
            if m["arch"]:
                arch = m["arch"]
            elif m["name"]:
                name = m["name"]
            else:
                found.append((elf, arch, name, {k: int(m[k]) for k in ("reg", "stack", "shared", "local")}))
    return found


def functions(text: str) -> dict[str, list[str]]:
    """Mangled name -> lines, of `nvdisasm -c`'s output."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith("\t.section\t"):
            name = line.split("\t")[2].split(",")[0]
            lines = found.setdefault(name[len(".text.") :], []) if name.startswith(".text.") else []
        else:
            lines.append(line)
    return found


def _read_elf(nvdisasm: str, path: Path, wanted: list[tuple[str, Report]]) -> list[Report]:
    code = functions(_run(nvdisasm, "-c", str(path)))
    for mangled, report in wanted:
        kernel = Code(code[mangled])
        report.ops = Counter(i.base for i in kernel.instructions)
        if not report.kernel.is_product:
            continue
        report.looped = Counter(i.base for i in kernel.looped)
        if loop := kernel.main_loop():
            head, body = loop
            report.path = kernel.common_path(head, body)
            report.inner = sum(other < body for _, other in kernel.loops)
    return [report for _, report in wanted]


def read(library: Path, arch: str | None = None, only: str | None = None, sass: bool = True) -> list[Report]:
    """Every kernel of a library, of one architecture or of all; only: a regular expression over Kernel.name.
    sass False: resources alone, in no time. Raises Unavailable without the tools."""
    cuobjdump, nvdisasm = find_tools()
    wanted: dict[int, list[tuple[str, Report]]] = {}
    for elf, of_arch, mangled, figures in resources(_run(cuobjdump, "-res-usage", str(library))):
        kernel = kernel_of(mangled)
        if (arch is None or of_arch == arch) and (only is None or re.search(only, kernel.name)):
            report = Report(kernel, of_arch, figures["reg"], figures["stack"], figures["shared"], figures["local"])
            wanted.setdefault(elf, []).append((mangled, report))
    if not sass:
        return [report for reports in wanted.values() for _, report in reports]
    with tempfile.TemporaryDirectory() as folder:
        _run(cuobjdump, "-xelf", "all", str(library.resolve()), cwd=folder)
        paths = {int(path.name.split(".so.")[1].split(".")[-3]): path for path in Path(folder).glob("*.cubin")}
        workers = min(len(os.sched_getaffinity(0)), len(wanted)) or 1
        with concurrent.futures.ProcessPoolExecutor(workers) as pool:
            sets = pool.map(_read_elf, [nvdisasm] * len(wanted), [paths[elf] for elf in wanted], wanted.values())
            return [report for reports in sets for report in reports]


def architectures(library: Path) -> list[str]:
    """What a library holds machine code for, oldest first."""
    cuobjdump, _ = find_tools()
    found = {arch for _, arch, _, _ in resources(_run(cuobjdump, "-res-usage", str(library)))}
    return sorted(found, key=lambda arch: (int(re.match(r"\d+", arch).group()), arch))


# ---- the table ----


@dataclass(frozen=True)
class Budget:
    """What a multiprocessor can do while a KB of weights arrives."""

    bandwidth: float = 4.8e12
    clock: float = 1.7e9
    multiprocessors: int = 132

    @property
    def cycles(self) -> float:
        return 1024 * self.multiprocessors * self.clock / self.bandwidth

    def load(self, report: Report) -> dict[str, float]:
        """Share of each resource that the loop needs at full bandwidth: above 1, it and not memory binds."""
        kb, pipes = report.kilobytes, report.pipes
        return {
            "issue": len(report.path) / kb / (4 * self.cycles),
            "alu": pipes["alu"] / kb / (2 * self.cycles),
            "imad": pipes["imad"] / kb / (2 * self.cycles),
            "shared": report.shared_cycles / kb / self.cycles,
        }


HEADER = (
    *("kernel", "arch", "reg", "spill", "|", "loop", "/KB", "alu", "imad", "fma", "mma", "lds", "ldgsts", "uni", "ctl"),
    *("|", "issue", "alu", "imad", "shared", "|", "binds", "|", "tensor"),
)


def row(report: Report, budget: Budget) -> list[str]:
    """A line of the table."""
    start = [report.kernel.name, report.arch, str(report.registers), str(report.spills) if report.spills else "", "|"]
    if not report.path:
        return start + [""] * (len(HEADER) - len(start))
    pipes, load = report.pipes, budget.load(report)
    worst = max(load, key=lambda name: load[name])
    return [
        *start,
        f"{len(report.path)}{'*' * bool(report.inner)}",
        f"{len(report.path) / report.kilobytes:.0f}",
        *(str(pipes[name]) for name in ("alu", "imad", "fma", "mma")),
        str(report.count("LDS")),
        str(report.count("LDGSTS", "STS")),
        str(pipes["uniform"]),
        str(pipes["control"]),
        "|",
        *(f"{load[name]:.2f}" for name in ("issue", "alu", "imad", "shared")),
        "|",
        f"{worst} {load[worst]:.2f}" if load[worst] > 1 else "bytes",
        "|",
        f"{report.tensor:.2f}",
    ]


def render(rows: list[list[str]]) -> str:
    lines = [list(HEADER), *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def order(report: Report) -> tuple:
    kernel = report.kernel
    return (kernel.family, kernel.input.startswith("int8"), -kernel.bits, kernel.input, kernel.token_tiles, kernel.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", help="a liblowbit_cuda.so, or the folder it is in")
    parser.add_argument("--arch", help="75, 80, 90a ...; 'all'; default: the newest")
    parser.add_argument("--only", help="a regular expression over the kernels' names", default="^(decode|tile)")
    parser.add_argument("--against", metavar="LIBRARY", help="another build: how many instructions a KB it has")
    parser.add_argument("--show", metavar="KERNEL", help="print the common path of the kernels that this name begins")
    parser.add_argument("--bandwidth", type=float, default=4.8, help="TB/s")
    parser.add_argument("--clock", type=float, default=1.7, help="GHz")
    parser.add_argument("--multiprocessors", type=int, default=132)
    options = parser.parse_args()
    try:
        library = find_library(options.library)
        arch = options.arch or architectures(library)[-1]
        arch = None if arch == "all" else arch
        only = "^" + re.escape(options.show) if options.show else options.only
        reports = sorted(read(library, arch, only), key=order)
        if options.show:
            for report in reports:
                print(f"{report.kernel.name}, sm_{report.arch}, {len(report.path)} instructions")
                print("\n".join(f"  {pipe_of(i):8}{i}" for i in report.path))
            return
        budget = Budget(options.bandwidth * 1e12, options.clock * 1e9, options.multiprocessors)
        print(f"{library}\n")
        print(render([row(report, budget) for report in reports]))
        print(
            f"\nA KB of weights: {budget.cycles:.1f} cycles of a multiprocessor, {4 * budget.cycles:.0f} issue slots, "
            f"{2 * budget.cycles:.0f} on a half-rate pipe. loop: one unit of 16 rows (* inner loops counted once); "
            "binds: what exceeds its share at full bandwidth."
        )
        if options.against:
            other = {(r.kernel, r.arch): r for r in read(find_library(options.against), arch, only)}
            print("\ninstructions of the loop, then -> now; registers")
            for report in reports:
                if before := other.get((report.kernel, report.arch)):
                    print(
                        f"  {report.kernel.name:36} sm_{report.arch:4} {len(before.path):5} -> {len(report.path):5}   "
                        f"{before.registers:3} -> {report.registers:3}"
                    )
    except Unavailable as reason:
        sys.exit(str(reason))


if __name__ == "__main__":
    main()
