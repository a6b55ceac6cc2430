"""What this machine and this build can do: the facts behind `lowbit doctor`, as one dict.

Reads and asks only; nothing is changed, and a part that is missing is reported in words instead of raised.
"""

from __future__ import annotations

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
    "avxvnni": "AVX-VNNI",
    "amx-int8": "AMX",
}
_BLOCKING = ("LOWBIT_TILES_FROM", "LOWBIT_OWN_DIGIT_BYTES")
_BESIDE_AVX512 = ("AVX2", "AVX-VNNI")  # go without saying


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
        "gpu": gpu(),
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
        names = [name for name in names if name not in _BESIDE_AVX512]
    if native["amx_refused"]:
        names.remove("AMX")
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
        _C.matmul_batching(FORMATS["int4"], 0)  # and what every product would
        features = _C.cpu_features()
        return {
            "library": _C.__file__,
            "version": _C.__version__,
            "compiler": _C.compiler,
            "cpu_features": features,
            "amx_refused": (_C.isa_missing("amx") if "amx-int8" in features.split() else None) or "",
            "isa": _C.isa(),
            "forced_isa": os.environ.get("LOWBIT_ISA"),
            "kernels": {
                verb: {name: _C.selected_kernel(verb, bits) for name, bits in formats.items()}
                for verb, formats in _verbs().items()
            },
            "table": [{"name": name, "runnable": runnable} for name, runnable in _C.kernels()],
            "threads": _C.threads(),
            "executor": _C.executor(),
        }
    # Whatever keeps the library from loading (not built, a missing runtime, a wrong LOWBIT_ISA) is the
    # finding.
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def kernel_choices() -> dict[str, Any]:
    """Why each verb runs the CPU kernel it runs.

    "kernels": a dict for each verb and format: "verb", "format", "kernel" (the one selected) and "rows", every row of
    the table for them, best first: "name" and "why", "" for the selected one, else why it is not.
    "matmul_tokens": "batch", the tokens that one pass over the weights takes, and "tiles_from", by mode and format the
    number from which activations lie as a tile of 16 tokens; fewer, or a tail of fewer, as rows. "own_digits": by mode
    and format, the columns up to which rows of a product with one token read its digits one by one, several together
    beyond; None: one by one, however many. "forced": the environment's variables that chose either.
    """
    import torch  # noqa: F401  before _C, see above

    from lowbit import _C
    from lowbit.abi import ACTIVATIONS, FORMATS

    table = [name for name, _ in _C.kernels()]
    choices = []
    for verb, formats in _verbs().items():
        for name, bits in formats.items():
            selected = _C.selected_kernel(verb, bits)
            rows = [row for row in table if _stem(row) == _stem(selected)]
            choices.append(
                {
                    "verb": verb,
                    "format": name,
                    "kernel": selected,
                    "rows": [{"name": row, "why": _why_not(row, selected, rows)} for row in rows],
                }
            )
    tokens: dict[str, Any] = {
        "batch": _C.matmul_batching(FORMATS["int4"], 0)[0],
        "tiles_from": {
            mode: {name: _C.matmul_batching(bits, number)[1] for name, bits in FORMATS.items()}
            for mode, number in ACTIVATIONS.items()
        },
    }
    tokens["own_digits"] = {
        mode: {name: _own_columns(bits, number) for name, bits in FORMATS.items()}
        for mode, number in ACTIVATIONS.items()
    }
    tokens["forced"] = {name: os.environ[name] for name in _BLOCKING if os.environ.get(name)}
    return {"kernels": choices, "matmul_tokens": tokens}


def _own_columns(bits: int, activations: int) -> int | None:
    from lowbit import _C

    columns = _C.matmul_sharing(bits, 1, activations)
    return None if columns == 2**63 - 1 else columns


def _verbs() -> dict[str, dict[str, int]]:
    from lowbit.abi import FORMATS

    return {
        "activations": {"any": 0},
        "matmul": FORMATS,
        "gather": FORMATS,
        "bags": FORMATS,
        "store": {"any": 0},
        "solve": {"any": 0},
        "rms_norm": {"any": 0},
        "silu_mul": {"any": 0},
        "decode_attention": {"any": 0},
    }


def _stem(kernel: str) -> str:
    return kernel.partition("__")[0]


def _why_not(row: str, selected: str, rows: list[str]) -> str:
    from lowbit import _C

    if row == selected:
        return ""
    missing = _C.isa_missing(row.partition("__")[2])
    if missing:
        return missing
    if rows.index(row) > rows.index(selected):
        return "a better one is selected"
    by = f"LOWBIT_ISA={os.environ['LOWBIT_ISA']}" if os.environ.get("LOWBIT_ISA") else f"the level {_C.isa()}"
    return f"forced off by {by}"


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


def gpu() -> dict[str, Any]:
    """{"built_for": architectures of the CUDA library or "", "devices": [lowbit_cuda_device as a dict], "usable",
    "state": one sentence, what there is or why nothing can be used}."""
    facts: dict[str, Any] = {"built_for": "", "devices": [], "usable": False}
    try:
        import torch  # noqa: F401  before _C, see above

        from lowbit import _C

        facts["built_for"] = _C.cuda_architectures()
        for index in range(_C.cuda_device_count()):
            facts["devices"].append(_C.cuda_describe(index))
    except (ImportError, NotImplementedError) as error:
        return facts | {"state": str(error).partition("\n")[0]}
    named = [f"{d['name']}, sm_{d['arch']}, {d['multiprocessors']} multiprocessors" for d in facts["devices"]]
    return facts | {"usable": True, "state": f"{'; '.join(named)}; built for {facts['built_for']}"}


def _warnings(facts: dict[str, Any]) -> list[str]:
    warnings = []
    native = facts["native"]
    if "error" in native:
        warnings.append(f"the native library cannot be used: {native['error']}")
    elif native["amx_refused"]:
        warnings.append(native["amx_refused"])
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
