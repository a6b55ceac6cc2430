"""What this machine and this build can do: the facts behind `lowbit doctor`, as one dict.

Reads and asks only; nothing is changed, and a part that is missing is reported in words instead of raised.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_OPENMP_LIBRARY = re.compile(r"/(lib(?:gomp|iomp5|omp)\b[^/]*\.so[^/]*)$")
_ISA_NAMES = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512vbmi": "VBMI",
    "avx512vnni": "VNNI",
    "avx512bf16": "BF16",
    "amx_int8": "AMX",
}


def examine() -> dict[str, Any]:
    """The native library (version, build, kernels, threads), CPU, OpenMP runtimes, huge pages, GPU, Python
    packages and warnings.

    `native` holds "error" alone when the compiled part cannot be used; `warnings` is a list of sentences.
    """
    facts: dict[str, Any] = {
        "packages": package_versions(("torch", "transformers", "tokenizers", "safetensors", "numpy")),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {"model": _cpu_model(), "available": available_cpus()},
        "native": _native(),
        "openmp": openmp_runtimes(Path("/proc/self/maps")),
        "huge_pages": _huge_pages(Path("/sys/kernel/mm/transparent_hugepage/enabled")),
        "gpu": gpu(Path(__file__).parent / "lib"),
    }
    facts["warnings"] = _warnings(facts)
    return facts


def summary(facts: dict[str, Any]) -> str:
    """One line: "AVX-512 VBMI VNNI · 2 threads · no GPU"."""
    native = facts["native"]
    if "error" in native:
        return f"the native library cannot be used: {native['error']}"
    features = native["cpu_features"].split()
    names = [name for feature, name in _ISA_NAMES.items() if feature in features]
    if "AVX-512" in names:
        names.remove("AVX2")
    forced = f" (held to {native['isa']} by LOWBIT_ISA)" if native["forced_isa"] else ""
    threads = native["threads"]
    return " · ".join(
        (
            (" ".join(names) or "no vector extension in use") + forced,
            f"{threads} thread{'s' if threads != 1 else ''}",
            "GPU" if facts["gpu"]["usable"] else "no GPU",
        )
    )


def _native() -> dict[str, Any]:
    try:
        import torch  # noqa: F401  before _C: its OpenMP runtime is the one to share

        from lowbit import _C
        from lowbit.abi import FORMATS

        if _C.isa() == "invalid":
            _C.set_isa(os.environ["LOWBIT_ISA"])  # raises what every verb would
        verbs = {
            "activations": {"any": 0},
            "matmul": FORMATS,
            "gather": FORMATS,
            "store": {"any": 0},
            "solve": {"any": 0},
        }
        return {
            "library": _C.__file__,
            "version": _C.__version__,
            "compiler": _C.compiler,
            "cpu_features": _C.cpu_features(),
            "isa": _C.isa(),
            "forced_isa": os.environ.get("LOWBIT_ISA"),
            "kernels": {
                verb: {name: _C.selected_kernel(verb, bits) for name, bits in formats.items()}
                for verb, formats in verbs.items()
            },
            "table": [{"name": name, "runnable": runnable} for name, runnable in _C.kernels()],
            "threads": _C.threads(),
            "executor": _C.executor(),
        }
    # Whatever keeps the library from loading (not built, a missing runtime, a wrong LOWBIT_ISA) is the
    # finding.
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def package_versions(names: Iterable[str]) -> dict[str, str | None]:
    """Installed versions, None for what is not installed; imports nothing."""
    versions: dict[str, str | None] = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def available_cpus() -> int:
    """CPUs this process may run on (its affinity; a container's time quota is not counted)."""
    return len(os.sched_getaffinity(0))


def openmp_runtimes(maps: Path) -> list[str]:
    """Paths of the OpenMP runtimes mapped into a process, from its /proc/<pid>/maps, each file once."""
    found: dict[tuple[str, str], str] = {}
    try:
        lines = maps.read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        # address perms offset device inode path
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and _OPENMP_LIBRARY.search(fields[5]):
            found.setdefault((fields[3], fields[4]), fields[5])
    return list(found.values())


def _huge_pages(setting: Path) -> str:
    """The kernel's choice for transparent huge pages: always, madvise, never, or unknown."""
    try:
        chosen = re.search(r"\[(\w+)\]", setting.read_text())
    except OSError:
        chosen = None
    return chosen[1] if chosen else "unknown"


def _cpu_model() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1] if match else platform.machine()


def gpu(library_folder: Path) -> dict[str, Any]:
    """{"library": built, "devices": [names], "usable", "state": one sentence}, from the NVIDIA driver."""
    built = (library_folder / "liblowbit_cuda.so").is_file()
    devices, problem = _cuda_devices()
    if problem:
        state = problem if built else f"{problem}; CUDA library not built"
    else:
        state = ", ".join(devices) + (": ready" if built else " found, but CUDA library not built")
    return {"library": built, "devices": devices, "usable": built and bool(devices), "state": state}


def _cuda_devices() -> tuple[list[str], str | None]:
    """Names of the devices of the CUDA driver, and what is wrong when there are none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return [], "no NVIDIA driver (libcuda.so.1 not found)"
    status = driver.cuInit(0)
    if status == 100:  # CUDA_ERROR_NO_DEVICE
        return [], "NVIDIA driver without a device"
    if status != 0:
        return [], f"NVIDIA driver does not start (cuInit: error {status})"
    count, names = ctypes.c_int(), []
    driver.cuDeviceGetCount(ctypes.byref(count))
    for index in range(count.value):
        name = ctypes.create_string_buffer(256)
        driver.cuDeviceGetName(name, len(name), index)
        names.append(name.value.decode(errors="replace"))
    return names, None if names else "NVIDIA driver without a device"


def _warnings(facts: dict[str, Any]) -> list[str]:
    warnings = []
    native = facts["native"]
    if "error" in native:
        warnings.append(f"the native library cannot be used: {native['error']}")
    if len(facts["openmp"]) > 1:
        warnings.append(
            f"{len(facts['openmp'])} OpenMP runtimes in one process, whose thread pools compete for the same "
            f"cores: {', '.join(facts['openmp'])}"
        )
    if facts["huge_pages"] == "never":
        warnings.append("transparent huge pages are off: reading weights from memory can be up to three times slower")
    if native.get("threads", 0) > facts["cpu"]["available"]:
        warnings.append(f"{native['threads']} threads for {facts['cpu']['available']} CPUs: set OMP_NUM_THREADS")
    if facts["packages"]["transformers"] is None:
        warnings.append("transformers is not installed: quantizing and running models needs `pip install 'lowbit[hf]'`")
    if sys.platform != "linux":
        warnings.append(f"{sys.platform} is not tested; Linux is")
    return warnings
