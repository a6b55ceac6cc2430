"""bitnet.cpp: I2_S, 2 bits a ternary weight, by its own kernels for AVX2.

Needs BITNET_ROOT, a checkout, and GGML_SOURCE, the ggml folder of llama.cpp, whose headers its kernels include
(bench/README.md). bitnet_matmul.cpp drives the kernels without the rest of llama.cpp, which favours them.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from functools import partial
from pathlib import Path

import torch

from peers import Matmul, copies_for
from peers.dense import CopiedWeights

SCALE = 0.02
_loaded: ctypes.CDLL | None = None


def _folder(name: str, holds: str) -> Path:
    path = Path(os.environ.get(name, ""))
    if not os.environ.get(name) or not (path / holds).is_file():
        raise ImportError(f"{name}: expected a folder that holds {holds}")
    return path


def available() -> dict:
    global _loaded
    bitnet = _folder("BITNET_ROOT", "src/ggml-bitnet-mad.cpp")
    ggml = _folder("GGML_SOURCE", "src/ggml-quants.h")
    output = Path(tempfile.mkdtemp()) / "bitnet_matmul.so"
    includes = [f"-I{p}" for p in (bitnet / "include", ggml / "include", ggml / "src", ggml / "src" / "ggml-cpu")]
    # Its quantizer, which is not called, names a type and a function that plain ggml has not or has elsewhere.
    flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-DGGML_TYPE_I2_S=GGML_TYPE_F32", *includes]
    flags += ["-Wl,--unresolved-symbols=ignore-all", "-Wl,-z,lazy"]
    sources = [str(Path(__file__).with_name("bitnet_matmul.cpp")), str(bitnet / "src" / "ggml-bitnet-mad.cpp")]
    subprocess.run(["c++", *flags, *sources, "-o", str(output)], check=True, capture_output=True)
    _loaded = ctypes.CDLL(str(output), mode=os.RTLD_LAZY)
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    _loaded.peer_matmul.argtypes = [
        pointer, ctypes.c_float, number, number, pointer, number, pointer, ctypes.c_int,
    ]  # fmt: skip
    _loaded.peer_matmul.restype = None
    return {"bitnet.cpp": "main"}


def _pack(trits: torch.Tensor) -> torch.Tensor:
    blocks = (trits + 1).to(torch.uint8).view(-1, 4, 32)
    return (blocks[:, 0] << 6 | blocks[:, 1] << 4 | blocks[:, 2] << 2 | blocks[:, 3]).contiguous()


def _i2_s(cols: int, rows: int, megabytes: int) -> CopiedWeights:
    trits = torch.randint(-1, 2, (rows, cols), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    codes, threads = _pack(trits), int(os.environ["OMP_NUM_THREADS"])

    def multiply(x: torch.Tensor, copy: torch.Tensor) -> torch.Tensor:
        y = torch.empty(x.shape[0], rows)
        _loaded.peer_matmul(copy.data_ptr(), SCALE, cols, rows, x.data_ptr(), x.shape[0], y.data_ptr(), threads)
        return y

    copies = [codes.clone() for _ in range(copies_for(codes.numel(), megabytes))]
    return CopiedWeights(copies, multiply, codes.numel(), cols, torch.float32, lambda: trits.float() * SCALE)


MATMUL = [Matmul("bitnet.cpp I2_S", 2, True, partial(_i2_s), ternary=True)]
GATHER: list = []
