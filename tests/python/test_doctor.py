"""What `lowbit doctor` finds out, on this machine and on made-up ones."""

import json
import os
import subprocess
import sys

import pytest
import torch

from lowbit import _C, doctor
from lowbit.cli.main import main

MAPS = """\
7f0000000000-7f0000001000 r--p 00000000 08:01 11    /usr/lib/libc.so.6
7f0000001000-7f0000002000 r-xp 00000000 08:01 12    /env/torch/lib/libgomp-24e2ab19.so.1.0.0
7f0000002000-7f0000003000 r--p 00001000 08:01 12    /env/torch/lib/libgomp-24e2ab19.so.1.0.0
7f0000003000-7f0000004000 r--p 00000000 08:01 13    /usr/lib/libgompertz.so
7f0000004000-7f0000005000 rw-p 00000000 00:00 0
"""


def test_this_machine():
    facts = doctor.examine()
    native = facts["native"]
    assert native["version"] == _C.__version__
    assert native["compiler"].split()[0] in ("gcc", "clang")
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["cpu"]["available"] == len(os.sched_getaffinity(0))
    names = {row["name"] for row in native["table"]}
    for verb in ("matmul", "gather"):
        assert set(native["kernels"][verb]) == {"int2", "int3", "int4", "int8", "trit"}
    assert {kernel for chosen in native["kernels"].values() for kernel in chosen.values()} <= names
    json.dumps(facts)


@pytest.fixture
def isa():
    yield _C.set_isa
    _C.set_isa("auto")


def test_kernel_choices_of_this_machine():
    choices = doctor.kernel_choices()
    names = [name for name, _ in _C.kernels()]
    assert sorted(names) == sorted({row["name"] for choice in choices["kernels"] for row in choice["rows"]})
    for choice in choices["kernels"]:
        (selected,) = [row["name"] for row in choice["rows"] if not row["why"]]
        assert selected == choice["kernel"]
        for row in choice["rows"]:
            missing = _C.isa_missing(row["name"].partition("__")[2])
            assert missing == "" or row["why"] == missing
    tokens = choices["matmul_tokens"]
    assert set(tokens["tiles_from"]["float"]) == {"int2", "int3", "int4", "int8", "trit"}
    assert (tokens["batch"], tokens["tiles_from"]["int8"]["int4"]) == _C.matmul_batching(4, 1)
    own = tokens["own_digits"]
    assert own["float"]["int4"] == _C.matmul_sharing(4, 1, 0) and set(own["int8"]) == set(tokens["tiles_from"]["int8"])


def test_kernel_choices_in_words(isa, monkeypatch):
    """Every reason, on a machine that has AVX2 and AVX-512 but neither AVX-VNNI nor the tiles of AMX."""
    missing = {"avxvnni": "the CPU lacks avxvnni", "amx": "the CPU has AMX, but the system refuses its tiles: no"}
    monkeypatch.setattr(_C, "isa_missing", lambda level: missing.get(level, ""))
    monkeypatch.delenv("LOWBIT_ISA", raising=False)

    def reasons():
        (choice,) = [c for c in doctor.kernel_choices()["kernels"] if (c["verb"], c["format"]) == ("matmul", "int4")]
        return {row["name"].partition("__")[2]: row["why"] for row in choice["rows"]}

    isa("ref")
    assert reasons() == missing | {
        "ref": "",
        "avx2": "forced off by the level ref",
        "avx512vnni": "forced off by the level ref",
    }
    monkeypatch.setenv("LOWBIT_ISA", "ref")
    assert reasons()["avx512vnni"] == "forced off by LOWBIT_ISA=ref"
    monkeypatch.setattr(_C, "selected_kernel", lambda verb, bits: f"int{bits}_matmul__avx2" if bits > 1 else "")
    assert reasons()["ref"] == "a better one is selected"


def test_levels():
    assert _C.isa_missing("ref") == "" and _C.isa_missing("avx9") is None
    for name, runnable in _C.kernels():
        assert (_C.isa_missing(name.partition("__")[2]) == "") == runnable


def test_tiles_that_the_system_refuses():
    facts = doctor.examine()
    reason = "the CPU has AMX, but the system refuses its tiles: no"
    facts["native"] |= {"cpu_features": "avx512f amx-tile amx-int8", "amx_refused": reason, "forced_isa": None}
    assert reason in doctor._warnings(facts)
    assert "AMX" not in doctor.summary(facts)
    facts["native"]["amx_refused"] = ""
    assert reason not in doctor._warnings(facts)
    assert doctor.summary(facts).startswith("AVX-512 AMX ·")


def test_one_openmp_runtime_in_this_process():
    torch.ones(8).sum()
    assert len(doctor.openmp_runtimes(doctor.Path("/proc/self/maps"))) == 1


def test_openmp_runtimes_are_told_apart(tmp_path):
    maps = tmp_path / "maps"
    maps.write_text(MAPS)
    assert doctor.openmp_runtimes(maps) == ["/env/torch/lib/libgomp-24e2ab19.so.1.0.0"]
    for name, inode in (("libgomp.so.1", 14), ("libiomp5.so", 15), ("libomp.so", 16)):
        maps.write_text(f"{maps.read_text()}7f10-7f20 r-xp 00000000 08:01 {inode}  /usr/lib/{name}\n")
    assert len(doctor.openmp_runtimes(maps)) == 4
    assert doctor.openmp_runtimes(tmp_path / "missing") == []


def test_warnings():
    facts = doctor.examine()
    assert not any("OpenMP" in warning for warning in facts["warnings"])
    facts["openmp"] = ["/a/libgomp.so.1", "/b/libiomp5.so"]
    facts["huge_pages"] = "never"
    facts["packages"]["transformers"] = None
    facts["native"]["threads"] = facts["cpu"]["available"] + 1
    warnings = "\n".join(doctor._warnings(facts))
    for part in ("2 OpenMP runtimes", "/b/libiomp5.so", "huge pages are off", "OMP_NUM_THREADS", "lowbit[hf]"):
        assert part in warnings


def test_summary():
    facts = doctor.examine()
    facts["native"] |= {"cpu_features": "avx2 fma avx512f avx512vnni", "forced_isa": None, "threads": 1}
    facts["gpu"]["usable"] = False
    assert doctor.summary(facts) == "AVX-512 VNNI · 1 thread · no GPU"
    facts["native"] |= {"cpu_features": "avx2 fma", "forced_isa": "ref", "isa": "ref", "threads": 2}
    assert doctor.summary(facts) == "AVX2 (held to ref by LOWBIT_ISA) · 2 threads · no GPU"
    facts["native"] = {"error": "ImportError: gone"}
    assert doctor.summary(facts) == "the native library cannot be used: ImportError: gone"


def fake_gpus(monkeypatch, count, describe):
    monkeypatch.setattr(_C, "cuda_architectures", lambda: "80 90a")
    monkeypatch.setattr(_C, "cuda_device_count", count)
    monkeypatch.setattr(_C, "cuda_describe", describe)


def test_gpus_in_words(monkeypatch):
    one = {"name": "H200", "arch": 90, "multiprocessors": 132}
    fake_gpus(monkeypatch, lambda: 2, lambda index: one)
    assert doctor.gpu() == {
        "built_for": "80 90a",
        "devices": [one, one],
        "usable": True,
        "state": "H200, sm_90, 132 multiprocessors; H200, sm_90, 132 multiprocessors; built for 80 90a",
    }


def test_a_gpu_that_cannot_be_used_in_words(monkeypatch):
    def refuse(*_):
        raise NotImplementedError("no usable GPU: no driver was found")

    for count, describe in ((refuse, None), (lambda: 1, refuse)):
        fake_gpus(monkeypatch, count, describe)
        facts = doctor.gpu()
        assert (facts["usable"], facts["devices"]) == (False, [])
        assert facts["state"] == "no usable GPU: no driver was found"


@pytest.mark.parametrize(
    "setting, chosen", [("always [madvise] never\n", "madvise"), ("[never]", "never"), ("", "unknown")]
)
def test_huge_page_setting(tmp_path, setting, chosen):
    (tmp_path / "enabled").write_text(setting)
    assert doctor._huge_pages(tmp_path / "enabled") == chosen
    assert doctor._huge_pages(tmp_path / "missing") == "unknown"


def test_package_versions():
    assert doctor.package_versions(("torch", "no-such-package-here")) == {
        "torch": torch.__version__,
        "no-such-package-here": None,
    }


def test_command(capsys):
    assert main(["doctor", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["native"]["isa"] == _C.isa()
    assert captured.err == ""
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert _C.selected_kernel("matmul", 4) in out and "\x1b[" not in out


def test_command_kernels(capsys):
    assert main(["doctor", "--kernels", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["choices"] == doctor.kernel_choices()
    assert main(["doctor", "--kernels"]) == 0
    out = capsys.readouterr().out
    for name, _ in _C.kernels():
        assert name in out
    batch, tiles_from = _C.matmul_batching(8, 0)
    assert f"trit {_C.matmul_sharing(1, 1, 0):,}" in out if _C.isa() in ("avx512vnni", "amx") else "int2 any" in out
    assert f"int8 {tiles_from}" in out and f"at most {batch} tokens" in out


@pytest.mark.parametrize("isa, code", [("ref", 0), ("avx9", 1)])
def test_forced_isa(isa, code):
    done = subprocess.run(
        [sys.executable, "-m", "lowbit", "doctor", "--json"],
        env={**os.environ, "LOWBIT_ISA": isa},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == code
    native = json.loads(done.stdout)["native"]
    if code:
        assert set(native) == {"error"} and '"avx9"' in native["error"]
    else:
        assert native["forced_isa"] == native["isa"] == "ref"
        assert native["kernels"]["matmul"]["int4"] == "int4_matmul__ref"


def _doctor(**environment: str) -> tuple[int, dict]:
    done = subprocess.run(
        [sys.executable, "-m", "lowbit", "doctor", "--kernels", "--json"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, json.loads(done.stdout)


def _isa_batching(isa: str, bits: int) -> int:
    _C.set_isa(isa)
    try:
        return _C.matmul_batching(bits, 0)[1]
    finally:
        _C.set_isa("auto")


def test_chosen_blocking():
    code, facts = _doctor(LOWBIT_TILES_FROM="int4=3,trit=40", LOWBIT_OWN_DIGIT_BYTES="2048", LOWBIT_ISA="avx2")
    tokens = facts["choices"]["matmul_tokens"]
    assert code == 0
    assert tokens["forced"] == {"LOWBIT_TILES_FROM": "int4=3,trit=40", "LOWBIT_OWN_DIGIT_BYTES": "2048"}
    own = {bits: _isa_batching("avx2", bits) for bits in (2, 3, 8)}
    assert tokens["tiles_from"]["float"] == {"int2": own[2], "int3": own[3], "int4": 3, "int8": own[8], "trit": 40}
    assert tokens["own_digits"]["float"] == {"int2": 1024, "int3": 1024, "int4": 1024, "int8": 1024, "trit": 640}


@pytest.mark.parametrize("name, value", [("LOWBIT_TILES_FROM", "0"), ("LOWBIT_OWN_DIGIT_BYTES", "int4=8,")])
@pytest.mark.parametrize("junk", ["", "int5=8", "int4=", "int4=8;int8=9", "8 ", "-1", "99999999999999999999"])
def test_blocking_that_is_no_choice(name, value, junk):
    """Said by doctor and by every product; lookups need no blocking."""
    code, facts = _doctor(**{name: junk or value})
    assert code == 1 and set(facts["native"]) == {"error"}
    assert facts["native"]["error"].startswith(f"ValueError: {name}: expected a number of at least ")
    assert f'got "{junk or value}"' in facts["native"]["error"]
