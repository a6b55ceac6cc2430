"""ggml's CPU backend, llama.cpp's kernels: Q4_0 (repacked), Q4_K, Q8_0 and the ternary TQ1_0 and TQ2_0.

Needs GGML_ROOT: a build of ggml, with include/ and its shared libraries in lib/ (bench/README.md). ggml_matmul.c, which
drives it through its public API, is compiled on first use.
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
from peers.dense import relative_error


def _root() -> Path:
    root = os.environ.get("GGML_ROOT")
    if not root or not (Path(root) / "include" / "ggml.h").is_file():
        raise ImportError("GGML_ROOT: expected the folder of a build of ggml, with include/ggml.h and lib/")
    return Path(root)


def _library() -> ctypes.CDLL:
    root = _root()
    output = Path(tempfile.mkdtemp()) / "ggml_matmul.so"
    command = [
        "cc",
        "-O2",
        "-shared",
        "-fPIC",
        f"-I{root / 'include'}",
        str(Path(__file__).with_suffix("")) + "_matmul.c",
    ]
    libraries = ["-lggml-cpu", "-lggml-base", "-lggml"]
    subprocess.run(
        [*command, f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}", *libraries, "-o", str(output)],
        check=True,
        capture_output=True,
    )
    library = ctypes.CDLL(str(output))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.peer_open.restype = library.peer_products.restype = pointer
    library.peer_open.argtypes = [ctypes.c_char_p, number, number, pointer, ctypes.c_int, ctypes.c_int, ctypes.c_int]
    library.peer_products.argtypes = [pointer, pointer, number]
    library.peer_run.argtypes = [pointer, pointer, ctypes.c_int]
    library.peer_bytes.restype, library.peer_bytes.argtypes = number, [pointer]
    for name in ("peer_result", "peer_dense"):
        getattr(library, name).argtypes = [pointer, pointer]
        getattr(library, name).restype = None
    for name in ("peer_free_products", "peer_close"):
        getattr(library, name).argtypes = [pointer]
        getattr(library, name).restype = None
    return library


_loaded: ctypes.CDLL | None = None


def available() -> dict:
    global _loaded
    _loaded = _library()
    version = ctypes.CDLL(str(next((_root() / "lib").glob("libggml-base.so*")))).ggml_version
    version.restype = ctypes.c_char_p
    return {"ggml": version().decode()}


class _Weights:
    matrices_per_call = 1

    def __init__(self, type_name: str, repack: bool, ternary: bool, cols: int, rows: int, megabytes: int):
        generator = torch.Generator().manual_seed(0)
        dense = torch.randn(rows, cols, generator=generator) * 0.02
        if ternary:  # what these types are for: one magnitude and zeros
            dense = torch.randint(-1, 2, (rows, cols), generator=generator).float() * 0.02
        self.cols, self.rows, self.type, self.source = cols, rows, type_name, dense
        self.threads = int(os.environ["OMP_NUM_THREADS"])
        probe = self._open(1, False)
        self.bytes = _loaded.peer_bytes(probe)
        self.dense = torch.empty(rows, cols)
        _loaded.peer_dense(probe, self.dense.data_ptr())
        _loaded.peer_close(probe)
        self.copies = copies_for(self.bytes, megabytes)
        self.matrices = self._open(self.copies, repack)
        self.source = None
        self.products: dict[int, tuple] = {}

    def _open(self, copies: int, repack: bool) -> int:
        matrices = _loaded.peer_open(
            self.type.encode(), self.cols, self.rows, self.source.data_ptr(), copies, self.threads, repack
        )
        if not matrices:
            raise RuntimeError(f"ggml: no {self.type} matrices of {self.rows}x{self.cols} here")
        return matrices

    def _products(self, tokens: int) -> tuple[torch.Tensor, int]:
        if tokens not in self.products:
            x = torch.randn(tokens, self.cols, generator=torch.Generator().manual_seed(tokens))
            self.products[tokens] = x, _loaded.peer_products(self.matrices, x.data_ptr(), tokens)
        return self.products[tokens]

    def calls(self, tokens: int) -> list:
        _, products = self._products(tokens)
        return [partial(_loaded.peer_run, self.matrices, products, i) for i in range(self.copies)]

    def warm(self, tokens: int):
        return partial(_loaded.peer_run, self.matrices, self._products(tokens)[1], 0)

    def error(self, tokens: int) -> float:
        x, products = self._products(tokens)
        _loaded.peer_run(self.matrices, products, 0)
        y = torch.empty(tokens, self.rows)
        _loaded.peer_result(products, y.data_ptr())
        return relative_error(y, x, self.dense)

    def __del__(self):
        if not hasattr(self, "products"):
            return
        for _, products in self.products.values():
            _loaded.peer_free_products(products)
        _loaded.peer_close(self.matrices)


MATMUL = [
    Matmul("ggml Q4_0 repacked", 4, True, partial(_Weights, "q4_0", True, False)),
    Matmul("ggml Q4_K", 4, True, partial(_Weights, "q4_K", True, False)),
    Matmul("ggml Q8_0", 8, True, partial(_Weights, "q8_0", False, False)),
    Matmul("ggml TQ1_0", 1.69, True, partial(_Weights, "tq1_0", False, True), ternary=True),
    Matmul("ggml TQ2_0", 2.06, True, partial(_Weights, "tq2_0", False, True), ternary=True),
]
GATHER: list = []
