"""What of the GPU verbs can be tested without a GPU: cuda_emulated.py on the emulated CUDA library, and what is said
where there is no CUDA library."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
BUILDS = ("wheel", "dev")


def emulated_library() -> Path | None:
    """Of the C++ tests' build, the latest; LOWBIT_EMULATED_LIBRARY names another."""
    if given := os.environ.get("LOWBIT_EMULATED_LIBRARY"):
        return Path(given)
    name = "tests/emulation/liblowbit_cuda_emulated.so"
    built = [HERE.parents[1] / "build" / build / name for build in BUILDS]
    return max((path for path in built if path.is_file()), key=lambda path: path.stat().st_mtime, default=None)


def run(arguments, library):
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "LOWBIT_CUDA_LIBRARY": str(library), "LOWBIT_TORCH_KERNELS": "python"},
        capture_output=True,
        text=True,
        timeout=1800,
    )


def test_verbs_on_the_emulated_gpu():
    library = emulated_library()
    if library is None:
        pytest.skip("liblowbit_cuda_emulated.so is not built: `make test-cpp` and `make dev` do")
    done = run(["-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "cuda_emulated.py")], library)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "violation" not in done.stdout + done.stderr


WITHOUT = """
import pytest, torch
from lowbit import PackedMatrix, _C, doctor
from lowbit.cli.torch_options import parse_device

assert _C.cuda_architectures() == ""
for call in (_C.cuda_device_count, lambda: _C.cuda_describe(0)):
    with pytest.raises(NotImplementedError, match="library could not be opened .*build lowbit where nvcc is found"):
        call()
facts = doctor.gpu()
assert not facts["usable"] and not facts["devices"] and "could not be opened" in facts["state"], facts
assert doctor.summary(doctor.examine()).endswith("no GPU")
with pytest.raises(NotImplementedError, match="device: cuda:1 cannot be used: .*could not be opened"):
    parse_device("cuda:1")
PackedMatrix.from_float(torch.ones(2, 64), "int4").matmul(torch.ones(1, 64))
"""


def test_without_a_cuda_library(tmp_path):
    done = run(["-c", WITHOUT], tmp_path / "missing.so")
    assert done.returncode == 0, done.stderr
