"""`make gpu`: builds for the card at hand and asks it everything, offline, in stages of minutes.

    build      liblowbit, liblowbit_cuda, the extension (in place, under python/lowbit) and the C++ tests
    probe      gpu_probe: whether the tensor cores keep fp16 subnormals, what the card reads and multiplies
    test       pytest on tests/python/test_cuda*.py, and the C++ tests
    sanitize   every_kernel under compute-sanitizer: memcheck, racecheck, initcheck, synccheck
    bench      bench/gpu.py

Run by the python3 that has torch, pybind11 and pytest; nothing is installed and no clock is set. Results and logs go to
bench/results/<gpu>, or to the folder of --out; each stage ends with a short table and is cut off before 9 minutes.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "gpu"
STAGES = ("build", "probe", "test", "sanitize", "bench")
LIMIT = 530.0  # seconds of a stage
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
sys.path.insert(0, str(ROOT / "bench"))

import gpu  # noqa: E402


class Stage:
    """One stage's log, its clock and the table that it ends with."""

    def __init__(self, name: str, out: Path):
        self.name, self.out, self.lines = name, out, []
        self.begin = time.monotonic()
        self.log = (out / f"{name}.log").open("w")
        self.failed = False

    def run(self, what: str, *command, check: bool = True, quiet: bool = True, **environment: str) -> tuple[int, str]:
        """Runs a command, its output into the log; what is left of the stage's time is its limit."""
        print(f"== {what}", flush=True)
        print(f"$ {' '.join(map(str, command))}", file=self.log, flush=True)
        left = max(1.0, LIMIT - (time.monotonic() - self.begin))
        begin, text = time.monotonic(), []
        path = os.pathsep.join([str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
        process = subprocess.Popen(
            ["timeout", "-k", "5", f"{left:.0f}", *map(str, command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **environment},
        )
        for line in process.stdout:
            text.append(line)
            self.log.write(line)
            if not quiet:
                print(line, end="", flush=True)
        code = process.wait()
        self.log.flush()
        taken = time.monotonic() - begin
        if check:
            verdict = "passed" if code == 0 else "cut off" if code in (124, 137) else f"failed ({code})"
            self.note(what, f"{verdict}, {taken:.0f} s")
            if code:
                self.failed = True
                if quiet:
                    print("".join(text[-60:]))
        return code, "".join(text)

    def note(self, what: str, found: str) -> None:
        self.lines.append((what, found))

    def end(self) -> bool:
        self.log.close()
        print(f"\n{self.name}: {time.monotonic() - self.begin:.0f} s, log in {self.out / self.name}.log")
        for what, found in self.lines:
            print(f"  {what:44} {found}")
        return not self.failed


def build(stage: Stage, card: dict) -> None:
    architecture = gpu.architecture(card["compute_capability"])
    options = [
        *("-S", ROOT, "-B", BUILD, "-DCMAKE_BUILD_TYPE=Release", "-DLOWBIT_TESTS=ON", "-DLOWBIT_CUDA=ON"),
        f"-DCMAKE_CUDA_ARCHITECTURES={architecture}",
        f"-DPython_EXECUTABLE={sys.executable}",
        *(["-G", "Ninja"] if shutil.which("ninja") else []),
    ]
    code, _ = stage.run(f"configure for sm_{architecture}", "cmake", *options, "-DLOWBIT_PYTHON=ON", check=False)
    stage.note("the extension lowbit._C", "built" if code == 0 else "not built: see the log; ctypes goes on without it")
    if code:
        code, _ = stage.run("configure without Python", "cmake", *options, "-DLOWBIT_PYTHON=OFF")
    if not stage.failed:
        code, _ = stage.run("build", "cmake", "--build", BUILD, "--parallel", str(len(os.sched_getaffinity(0))))
    if not stage.failed:
        stage.run("install under python/lowbit", "cmake", "--install", BUILD, "--prefix", ROOT / "python")
    library = ROOT / "python/lowbit/lib/liblowbit_cuda.so.0"
    if library.is_file():
        stage.note("liblowbit_cuda.so.0", f"{library.stat().st_size / 1e6:.1f} MB")


def probe(stage: Stage, card: dict) -> None:
    _, text = stage.run("gpu_probe", BUILD / "tests/gpu/gpu_probe", stage.out / "probe.json")
    for line in text.splitlines()[1:]:
        name, rest = line[:44].strip(), line[44:].strip()
        if rest:
            stage.note(name, " ".join(rest.split()))


def test(stage: Stage, card: dict) -> None:
    stage.run("ctest", "ctest", "--test-dir", BUILD, "--output-on-failure", "--no-tests=error", "-j4")
    files = sorted((ROOT / "tests/python").glob("test_cuda*.py"))
    _, text = stage.run("pytest tests/python/test_cuda*.py", sys.executable, "-m", "pytest", "-q", "-x", *files)
    last = [line for line in text.splitlines() if re.search(r"\d+ (passed|failed|skipped|error)", line)]
    stage.note("pytest", last[-1].strip("= ") if last else "nothing ran")


def errors_of(text: str) -> int | None:
    """Errors that compute-sanitizer counted; None where it did not run the program."""
    found = re.findall(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): (\d+) (?:error|hazard)", text)
    return int(found[-1]) if found else None


def sanitize(stage: Stage, card: dict) -> None:
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if not program:
        return stage.note("compute-sanitizer", "not found, so nothing was checked")
    environment = {"LOWBIT_CUDA_LIBRARY": str(ROOT / "python/lowbit/lib/liblowbit_cuda.so.0")}
    stage.run("every_kernel, by itself", BUILD / "tests/gpu/every_kernel", **environment)
    for tool in TOOLS:
        for bits in (4, 8, 2, 3, 1):  # one format a process: what was done stays done when time runs out
            name = f"{tool}, {'trit' if bits == 1 else f'int{bits}'}"
            code, text = stage.run(
                name,
                *(program, "--tool", tool, "--error-exitcode", "86", "--launch-timeout", "120", "--print-limit", "20"),
                *(str(BUILD / "tests/gpu/every_kernel"), str(bits)),
                check=False,
                **environment,
            )
            errors = errors_of(text)
            unsupported = re.search(r"[^\n]*(?:not supported|Device not supported)[^\n]*", text)
            if errors == 0 and code == 0:
                stage.note(name, "no errors")
            elif code in (124, 137):
                stage.note(name, "cut off: not checked to the end")
                stage.failed = True
            elif unsupported and not errors:
                return stage.note(name, f"does not work on this machine: {unsupported.group().strip('= ')}")
            else:
                stage.failed = True
                stage.note(name, f"{errors if errors is not None else 'no count of'} errors, status {code}")
                print("\n".join(text.splitlines()[:60]))


def bench(stage: Stage, card: dict) -> None:
    stage.run("bench/gpu.py", sys.executable, "bench/gpu.py", "--out", stage.out, quiet=False)
    stage.note("rows", str(stage.out / "gpu.json"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES), default=STAGES)
    parser.add_argument("--out", help="folder for results and logs; default: bench/results/<gpu>")
    options = parser.parse_args()
    if unknown := set(options.stages) - set(STAGES):
        parser.error(f"stage: expected one of {', '.join(STAGES)}, got {', '.join(unknown)}")
    try:
        card = gpu.card()
    except (OSError, subprocess.CalledProcessError) as reason:
        sys.exit(f"no NVIDIA GPU was found: {reason}")
    out = Path(options.out or ROOT / "bench/results" / gpu.slug(card["gpu"])).resolve()
    out.mkdir(parents=True, exist_ok=True)
    print(f"{card['gpu']}, driver {card['driver']}, clocks as found: {card['clocks']}")
    passed = True
    for name in STAGES:
        if name in options.stages:
            stage = Stage(name, out)
            globals()[name](stage, card)
            passed &= stage.end()
            if not passed and name == "build":
                break
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
