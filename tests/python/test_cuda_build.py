"""What nvcc made of the GPU kernels, gated with no GPU: registers, local memory, tensor cores, the place of the copies.

The library is the one that this machine built (build/wheel, build/dev or LOWBIT_CUDA_BUILT), read with cuobjdump and
nvdisasm by bench/sass.py; where there is no nvcc, or nothing to read it with, those tests are skipped. The reader
itself is tested on small texts, everywhere.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))

import sass  # noqa: E402

TRIT = sass.TRIT

# What today's kernels fail: kernel -> architecture -> (loads and stores of local memory, of them on a unit's path).
# More of either is an error, and so is an entry that no longer fails: the list only shrinks. Made with nvcc 13.0.
SPILLS: dict[str, dict[str, tuple[int, int]]] = {}
# The same of kernels that are no products.
OTHER_SPILLS: dict[str, dict[str, int]] = {}

# Most registers of every other kernel: what is there now, and a little.
MOST_REGISTERS = {
    "gather_rows": 84,  # 3 or 4 blocks of 256 threads
    "gather_permuted": 64,
    "gather_bags": 128,
    "pack_rows": 120,
    "unpack_rows": 60,
    "plain": 72,
    "prepare": 40,
    "quantize": 40,
    "solve_block": 128,
    "push_block": 170,
    "check_scales": 24,
    "check_zeros": 24,
    "check_trits": 24,
    "check_perm": 24,
    "mark_columns": 32,
    "nothing": 16,
}


@pytest.fixture(scope="module")
def reports() -> list[sass.Report]:
    try:
        return sass.read(sass.find_library())
    except sass.Unavailable as reason:
        pytest.skip(str(reason))


def number(arch: str) -> int:
    return int(re.match(r"\d+", arch).group())


def mma_of_unit(kernel: sass.Kernel, arch: int) -> int:
    """Tensor-core instructions of one unit of weights."""
    tiles = sass.PLANES[kernel.bits] * kernel.token_tiles * kernel.row_tiles
    if kernel.input.startswith("int8"):  # two steps of k32 a plane; m8n8k16 before sm_80
        return 2 * tiles * (2 if kernel.input == "int8x2" else 1) * (1 if arch >= 80 else 4)
    halves = 2 if kernel.bits == 8 and kernel.input == "bf16" else 1  # a code of 8 bits goes in as two
    return 4 * tiles * halves * (1 if arch >= 80 else 2)  # four steps of k16 a plane; k8 before sm_80


def codes_and_activations(kernel: sass.Kernel) -> int:
    """LDS.128 of a unit: the lines of two rows a lane, and per plane its columns of every tile of tokens."""
    lines, planes = 2 * sass.LINES[kernel.bits] * kernel.row_tiles, sass.PLANES[kernel.bits]
    per_plane = {"int8": 1, "int8x2": 2}.get(kernel.input, 2)
    return lines + planes * per_plane * kernel.token_tiles


def gates(report: sass.Report) -> dict[str, str]:
    """What a product kernel fails: gate -> found."""
    kernel, arch, failed = report.kernel, number(report.arch), {}
    most = 128 if kernel.resident == 2 else 255
    if report.registers > most:
        failed["registers"] = f"expected at most {most}, got {report.registers}"
    known = SPILLS.get(kernel.name, {}).get(report.arch, (0, 0))
    if (report.looped["STL"] + report.looped["LDL"] > 0 and report.spills > known[0]) or report.spills_in_loop > known[
        1
    ]:
        failed["local memory"] = f"{report.spills} STL and LDL, {report.spills_in_loop} of them a unit; known: {known}"
    if arch < 75 or (kernel.input == "bf16" and arch < 80):  # never launched there
        return failed
    if not report.path:
        return failed | {"loop": "no loop with copies and mma was found"}
    name = "IMMA" if kernel.input.startswith("int8") else "HMMA"
    mma, expected = [i for i in report.path if sass.is_mma(i)], mma_of_unit(kernel, arch)
    if {i.base for i in mma} != {name} or len(mma) != expected:
        failed["mma"] = f"expected {expected} {name} a unit, got {sorted(i.op for i in mma)}"
    wide = sum(i.op.startswith("LDS") and ".128" in i.op and not i.never for i in report.path)
    if wide < codes_and_activations(kernel):
        failed["LDS.128"] = f"expected {codes_and_activations(kernel)} a unit, got {wide}"
    if arch < 80:
        return failed
    copies = [i for i in report.path if sass.is_copy(i)]
    if any(i.base != "LDGSTS" for i in copies):
        failed["copies"] = f"expected LDGSTS alone, got {[str(i) for i in copies]}"
    if kernel.family == "decode" and len(copies) != 2 * sass.LINES[kernel.bits]:
        failed["copies"] = f"expected {2 * sass.LINES[kernel.bits]} LDGSTS of 16 bytes a unit, got {len(copies)}"
    if not report.copies_lead:
        failed["order"] = "a copy of the next unit comes after the first mma"
    if kernel.scales != "fine" and report.count("LDG"):
        failed["loads"] = f"expected copies alone, got {report.count('LDG')} LDG a unit"
    return failed


# ---- the library ----


def test_every_product_kernel_was_found(reports):
    """The instantiations of csrc/cuda/launchers.cuh."""
    by_arch: dict[str, list[str]] = {}
    for report in reports:
        if report.kernel.is_product:
            by_arch.setdefault(report.arch, []).append(report.kernel.name)
    # decode: 4 formats x 2 dtypes x 2 x 3, less int8's planes, which are units, and pairs of planes of int2 and int3;
    # int8 mode 4 x 2 x 2, trit 2 x 2 x 3;
    # tile: scales a plane 3 x 2 x 2 (int2, int3, int4), a unit 2 x 2 x 2 (int4, int8), 32 rows a warp 2 x 2
    for arch, names in by_arch.items():
        assert len(names) == len(set(names)) == 48 - 4 + 8 + 16 + 12 + 12 + 8 + 4, arch


def test_product_kernels_pass_every_gate(reports):
    products = [report for report in reports if report.kernel.is_product]
    failed = [f"{r.kernel.name}, sm_{r.arch}, {gate}: {what}" for r in products for gate, what in gates(r).items()]
    assert not failed, "\n".join(failed)


def test_what_is_known_to_spill_still_does(reports):
    spills = {(report.kernel.name, report.arch): report.spills for report in reports}
    known = {(kernel, arch) for table in (SPILLS, OTHER_SPILLS) for kernel, archs in table.items() for arch in archs}
    mended = [key for key in known if spills.get(key) == 0]
    assert not mended, f"take these out of the lists: {sorted(mended)}"


def test_other_kernels_stay_within_their_registers_and_off_tensor_cores(reports):
    failed = []
    for report in reports:
        name = report.kernel.family
        if report.kernel.is_product:
            continue
        if name not in MOST_REGISTERS:
            failed.append(f"{name}: not in MOST_REGISTERS")
        elif report.registers > MOST_REGISTERS[name]:
            failed.append(
                f"{report.kernel.name} sm_{report.arch}: {report.registers} > {MOST_REGISTERS[name]} registers"
            )
        if mma := [op for op in report.ops if op in ("HMMA", "IMMA", "HGMMA")]:
            failed.append(f"{report.kernel.name} sm_{report.arch}: {mma}")
        if report.spills > OTHER_SPILLS.get(report.kernel.name, {}).get(report.arch, 0):
            failed.append(f"{report.kernel.name} sm_{report.arch}: {report.spills} STL and LDL")
    assert not failed, "\n".join(failed)


# ---- the reader ----

MANGLED = {
    "_ZN6lowbit4cuda6decodeINS0_12FloatProductILi4ELb1ELi2ELNS0_6ScalesE1EEEEEvNS0_15DecodeArgumentsE": (
        "decode int4 bf16 x16 plane"
    ),
    "_ZN6lowbit4cuda6decodeINS0_14IntegerProductILi1ELi2ELi1ELNS0_5SpansE0EEEEEvNS0_15DecodeArgumentsE": (
        "decode trit int8x2 x8 whole"
    ),
    "_ZN6lowbit4cuda4tileILi2ELb0ELi2ELi8ELNS0_6ScalesE1EEEvNS0_13TileArgumentsE": "tile int2 fp16 x64 plane 32 rows",
    "_ZN6lowbit4cuda5plainILi3EEEvNS0_14PlainArgumentsE": "plain int3",
    "_ZN6lowbit4cuda43_GLOBAL__N__9555e3e9_10_backend_cu_8e693f877nothingEv": "nothing",
    "_ZN6lowbit4cuda41_GLOBAL__N__9555e3e9_9_gather_cu_8e693f8711gather_rowsILi8EL12lowbit_dtype1EEEvNS_E": (
        "gather_rows int8 fp16"
    ),
    "_ZN6lowbit4cuda43_GLOBAL__N__9555e3e9_10_prepare_cu_8e693f877prepareILb1EEEvNS0_16PrepareE": "prepare bf16",
}


@pytest.mark.parametrize("mangled, name", MANGLED.items())
def test_names(mangled, name):
    assert sass.kernel_of(mangled).name == name


def test_resident_blocks_are_those_of_the_kernels():
    """resident_blocks of matmul_plan.h."""
    one = [
        sass.Kernel("decode", 3, "fp16", 1),
        sass.Kernel("decode", 3, "int8", 2),
        sass.Kernel("decode", 2, "bf16", 2),
        sass.Kernel("decode", TRIT, "int8", 2, scales="whole"),
        sass.Kernel("decode", TRIT, "int8x2", 1, scales="plane"),
    ]
    two = [
        sass.Kernel("decode", 2, "fp16", 1),
        sass.Kernel("decode", 2, "int8", 2),
        sass.Kernel("decode", 4, "bf16", 2),
        sass.Kernel("decode", TRIT, "int8", 1, scales="whole"),
    ]
    assert [kernel.resident for kernel in one] == [1] * len(one)
    assert [kernel.resident for kernel in two] == [2] * len(two)


RESOURCES = """
Fatbin elf code:
================
arch = sm_80
 Function _ZN6lowbit4cuda5plainILi3EEEvNS0_14PlainArgumentsE:
  REG:48 STACK:16 SHARED:0 LOCAL:0 CONSTANT[0]:352 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin ptx code:
================
arch = sm_120

Fatbin elf code:
================
arch = sm_90a
 Function nothing:
  REG:4 STACK:0 SHARED:1 LOCAL:8 CONSTANT[0]:352 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_resources_tell_the_architectures_apart():
    (first, second) = sass.resources(RESOURCES)
    assert first[:2] == (1, "80") and first[3] == {"reg": 48, "stack": 16, "shared": 0, "local": 0}
    assert second == (2, "90a", "nothing", {"reg": 4, "stack": 0, "shared": 1, "local": 8})


# A loop over tiles round a loop over units: a rare branch (.L_x_3), a jump table, and an exit by CALL.
LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   STL [R1], R0 ;
.L_x_1:
        /*0020*/              @!P1 BRA `(.L_x_3) ;
.L_x_2:
        /*0030*/                   BRXU UR6 -0x40                     (*"BRANCH_TARGETS .L_x_4,.L_x_5"*);
.L_x_3:
        /*0040*/                   IMAD R2, R3, R4, R5 ;
        /*0050*/                   SHF.R.S32.HI R2, RZ, 0x1f, R2 ;
        /*0060*/                   BRA `(.L_x_2) ;
.L_x_4:
        /*0070*/                   BRA `(.L_x_6) ;
.L_x_5:
        /*0080*/                   DEPBAR.LE SB0, 0x2 ;
        /*0090*/                   NOP ;
.L_x_6:
        /*00a0*/              @!PT LDS RZ, [RZ] ;
        /*00b0*/                   LDGSTS.E.BYPASS.LTC128B.128 [R33], desc[UR12][R28.64] ;
        /*00c0*/                   LDS.128 R28, [R36+UR7] ;
        /*00d0*/               @P2 BRA `(.L_x_7) ;
        /*00e0*/                   HMMA.16816.F32 R44, R48, R36, R44 ;
.L_x_7:
        /*00f0*/               @P3 CALL.REL.NOINC `(.L_x_8) ;
        /*0100*/                   BRA `(.L_x_1) ;
.L_x_8:
        /*0110*/               @P4 BRA `(.L_x_0) ;
        /*0120*/                   EXIT ;
.L_x_9:
        /*0130*/                   BRA `(.L_x_9) ;
"""


def listed() -> tuple[sass.Code, sass.Report]:
    code = sass.Code(LISTING.splitlines())
    report = sass.Report(sass.Kernel("decode", 4, "fp16", 1, scales="unit"), "90a", 100, 0, 0, 0)
    report.path = code.common_path(*code.main_loop())
    return code, report


def test_the_main_loop_is_the_smallest_with_copies_and_mma():
    code, _ = listed()
    head, body = code.main_loop()
    assert str(code.inside([head])[0]) == "@!P1 BRA `(.L_x_3)"
    assert "STL" not in {i.base for i in code.inside(body)}
    assert "STL" in {i.base for i in code.looped} and "MOV" not in {i.base for i in code.looped}


def test_the_common_path_copies_multiplies_and_leaves_rare_branches_out():
    _, report = listed()
    assert [i.base for i in report.path] == ["BRA", "BRXU", "BRA", "LDS", "LDGSTS", "LDS", "BRA", "HMMA", "CALL", "BRA"]
    assert report.copies_lead
    assert report.count("LDS") == 1  # the other never runs
    assert report.pipes == {"control": 7, "memory": 2, "mma": 1}
    assert report.shared_cycles == 8


def test_copies_after_the_first_mma_are_seen():
    _, report = listed()
    report.path.append(next(i for i in report.path if sass.is_copy(i)))
    assert not report.copies_lead
    assert "order" in gates(report)


def test_budget():
    _, report = listed()
    budget = sass.Budget()
    assert budget.cycles == pytest.approx(47.9, abs=0.1)
    load = budget.load(report)
    assert load["issue"] == pytest.approx(10 / 191.5, rel=1e-3)
    assert load["shared"] == pytest.approx(8 / 47.9, rel=1e-2)
    assert len(sass.row(report, budget)) == len(sass.HEADER)
    assert "bytes" in sass.render([sass.row(report, budget)])


def test_no_library_and_no_tools_are_reasons_to_skip(monkeypatch, tmp_path):
    with pytest.raises(sass.Unavailable, match="no such library"):
        sass.find_library(str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("LOWBIT_CUDA_TOOLS", raising=False)
    monkeypatch.setattr(sass.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(sass.Unavailable, match="cuobjdump and nvdisasm"):
        sass.find_tools()
