"""How a ternary matrix of a file is held once it is loaded: as trits, 1.6 bits a weight, or as int2 with zero point 1,
2 bits a weight and fewer operations to decode. `choose_ternary` decides, by what was measured:

    rows x cols    bytes    time at 1, 16 and 128 tokens
    256 x 256       1.00        0.93   0.64   0.62
    768 x 256       1.00        0.91   0.62   0.61
    256 x 768       1.00        0.87   0.74   0.74
    1024 x 1024     1.00        0.82   0.87   0.88
    2048 x 2048     1.14        0.87   0.86   0.88
    4096 x 4096     1.23        0.93   1.10   1.02
    11008 x 4096    1.23        0.95   1.11   1.03
    4096 x 1280     1.25        0.97   1.05   1.07

int2 / trit: bytes of the codes, and the median over alternating slices of the time of PackedMatrix.matmul; float
activations, one scale a matrix, one thread, weights in the caches, AMD family 25 model 17 (avx512vnni). `lowbit bench
--format trit --format trit-int2` shows both on a machine and shape of one's own.

So int2 is taken where rows are so short that it needs no more lines than trits do: there it is faster for nothing.
With 23% more bytes it loses at many tokens what it gains at one. At 2048 columns it is faster for 14% more memory,
which is left to those who ask for it: the bytes are why a model is ternary.
"""

import torch

from .. import _C
from ..abi import FORMATS, LINE_BYTES
from ..matrix import PackedMatrix
from .native import packed_modules

CHOICES = ("auto", "trit", "int2")


def choose_ternary(rows: int, cols: int, activations: str = "float") -> str:
    """ "trit" or "int2", whichever multiplies faster for a ternary matrix [rows, cols].

    activations: with "int8" always "trit": BitNet's step is the token's, int2's that of 128 columns.
    """
    if activations == "int8":
        return "trit"
    return "int2" if _code_bytes("int2", rows, cols) <= _code_bytes("trit", rows, cols) else "trit"


def hold_ternary(model: torch.nn.Module, choice: str) -> None:
    """Lets every module of a model whose matrix is stored as trits hold it as `choice` says, one of CHOICES.

    Matrices stay shared. Modules remember what they were stored as (`stored_format`), and are saved so.
    """
    if choice == "trit":
        return
    held: dict[int, PackedMatrix] = {}
    modules = [(module, matrix) for _, module, matrix in packed_modules(model) if matrix.format == "trit"]
    for module, matrix in modules:
        key = matrix.codes.data_ptr()
        if key not in held:
            modes = {getattr(m, "activations", "float") for m, other in modules if other.codes.data_ptr() == key}
            mode = "int8" if "int8" in modes else "float"
            held[key] = matrix.repack(choose_ternary(*matrix.shape, mode) if choice == "auto" else choice)
        if held[key].format != matrix.format:
            module._put(held[key])
            module.stored_format = matrix.format


def _code_bytes(format: str, rows: int, cols: int) -> int:
    return rows * LINE_BYTES * _C.row_lines(FORMATS[format], cols)
