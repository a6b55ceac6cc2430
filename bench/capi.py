"""liblowbit's GPU verbs through ctypes, over pointers of torch tensors: no torch op and no extension lie between a
benchmark and a launch. What it declares is csrc/include/lowbit/lowbit.h, and tests/python/test_bench_gpu.py holds the
two together.
"""

from __future__ import annotations

import ctypes as c
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRIT = 1
F32, F16, BF16, I32, I64 = range(5)
ACT_FLOAT, ACT_INT8 = range(2)
IDS_ERROR, IDS_ZERO, IDS_CLAMP = range(3)


class Matrix(c.Structure):
    _fields_ = (
        ("format", c.c_int),
        ("rows", c.c_int64),
        ("cols", c.c_int64),
        ("group_size", c.c_int64),
        ("codes", c.c_void_p),
        ("scales", c.c_void_p),
        ("scale_dtype", c.c_int),
        ("scale_rows", c.c_int64),
        ("scale_cols", c.c_int64),
        ("zeros", c.c_void_p),
        ("perm", c.c_void_p),
    )


class Queue(c.Structure):
    _fields_ = (("device", c.c_int32), ("stream", c.c_void_p))


class Device(c.Structure):
    _fields_ = (
        ("name", c.c_char * 128),
        ("arch", c.c_int32),
        ("multiprocessors", c.c_int32),
        ("shared_per_block", c.c_int32),
        ("shared_per_sm", c.c_int32),
        ("driver", c.c_int32),
        ("runtime", c.c_int32),
    )


class Plan(c.Structure):
    _fields_ = (
        ("kernel", c.c_char * 32),
        ("prefers_unpack", c.c_int32),
        ("workspace_bytes", c.c_size_t),
        ("zeroed_bytes", c.c_size_t),
    )


class GptqOptions(c.Structure):
    _fields_ = (
        ("format", c.c_int),
        ("group_size", c.c_int64),
        ("symmetric", c.c_int),
        ("clip", c.c_int),
        ("static_grids", c.c_int),
        ("scale_dtype", c.c_int),
        ("block_size", c.c_int64),
    )


_P, _I, _L, _S = c.c_void_p, c.c_int, c.c_int64, c.c_size_t
_M, _Q = c.POINTER(Matrix), c.POINTER(Queue)

# Arguments of every function used here, in the header's order; all return a status.
SIGNATURES = {
    "lowbit_cuda_describe": (c.c_int32, c.POINTER(Device)),
    "lowbit_cuda_matmul_plan": (c.POINTER(Device), _M, _L, _I, _I, c.POINTER(Plan)),
    "lowbit_cuda_matmul": (_Q, _M, _P, _I, _L, _L, _P, _I, _P, _L, _I, _P, _S),
    "lowbit_cuda_gather": (_Q, _M, _P, _I, _L, _I, _L, _P, _P, _I, _L),
    "lowbit_cuda_unpack": (_Q, _M, _L, _L, _P, _I, _L),
    "lowbit_cuda_pack_codes": (_Q, _M, _P, _P, _P),
    "lowbit_cuda_gptq_workspace": (c.POINTER(GptqOptions), _L, _L, c.POINTER(_S)),
    "lowbit_cuda_gptq_solve": (_Q, c.POINTER(GptqOptions), _L, _L, _P, _P, _P, _P, _P, _P, _P, _P, _S),
}


class LowbitError(RuntimeError):
    """A verb's status was not OK; the message is lowbit_last_error's."""


class Library:
    """liblowbit, its verbs as methods: `library.matmul(queue, matrix, ...)` raises LowbitError unless it is OK."""

    def __init__(self, path: str | os.PathLike | None = None):
        """path: liblowbit.so.0; default: LOWBIT_LIBRARY, or the one of an in-place build."""
        path = path or os.environ.get("LOWBIT_LIBRARY") or ROOT / "python/lowbit/lib/liblowbit.so.0"
        self._library = c.CDLL(str(path))
        self._library.lowbit_last_error.restype = c.c_char_p
        self._library.lowbit_version.restype = c.c_char_p
        self._library.lowbit_cuda_architectures.restype = c.c_char_p
        self._library.lowbit_row_lines.argtypes = (_I, _L)
        self._library.lowbit_row_lines.restype = c.c_int64
        for name, arguments in SIGNATURES.items():
            function = getattr(self._library, name)
            function.argtypes, function.restype = arguments, c.c_int
            setattr(self, name.removeprefix("lowbit_cuda_"), self._checked(name, function))

    def _checked(self, name: str, function):
        def call(*arguments) -> None:
            if function(*arguments) != 0:
                raise LowbitError(f"{name}: {self._library.lowbit_last_error().decode()}")

        return call

    def version(self) -> str:
        return self._library.lowbit_version().decode()

    def architectures(self) -> str:
        return self._library.lowbit_cuda_architectures().decode()

    def row_bytes(self, bits: int, cols: int) -> int:
        return 64 * self._library.lowbit_row_lines(bits, cols)

    def device(self, index: int = 0) -> Device:
        description = Device()
        self.describe(index, c.byref(description))
        return description

    def plan(self, device: Device, w: Matrix, tokens: int, dtype: int = F16, activations: int = ACT_FLOAT) -> Plan:
        plan = Plan()
        self.matmul_plan(c.byref(device), c.byref(w), tokens, dtype, activations, c.byref(plan))
        return plan
