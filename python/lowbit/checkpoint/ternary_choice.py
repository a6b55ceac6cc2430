"""How a ternary matrix of a file is held once it is loaded: as trits, 1.6 bits a weight, or as int2 with zero point 1,
2 bits a weight and fewer operations to decode. `choose_ternary` decides, by what was measured:

    rows x cols    bytes    time at 1, 16 and 128 tokens
                            AVX2                  AVX-512 VNNI
    256 x 256       1.00    1.06   0.59   0.55    1.01   0.99   0.97
    768 x 256       1.00    0.95   0.55   0.54    1.01   0.99   0.97
    256 x 768       1.00    0.78   0.70   0.72    0.96   1.04   1.02
    1024 x 1024     1.00    0.70   0.90   0.92    0.89   1.05   1.06
    2048 x 2048     1.14    0.67   0.92   0.93    0.92   1.07   1.05
    4096 x 4096     1.23    0.73   1.07   1.04    0.96   1.09   1.06
    11008 x 4096    1.23    0.74   1.07   1.05    0.96   1.09   1.07
    4096 x 1280     1.25    0.73   1.14   1.13    1.09   1.09   1.07

int2 / trit: bytes of the codes, and the median over alternating slices of the time of PackedMatrix.matmul; float
activations, one scale a matrix, one thread, weights in the caches, AMD family 25 model 17. `lowbit bench --format trit
--format trit-int2` shows both on a machine and shape of one's own.

So int2 is taken by a CPU without AVX-512 VNNI where rows are so short that it needs no more lines than trits do: there
it is faster for nothing. Where trits have AVX-512's rows they are level. With more bytes int2 is faster at one token
out of the caches, which is left to those who ask for it: the bytes are why a model is ternary.
"""

import torch

from .. import _C
from ..abi import FORMATS, LINE_BYTES
from ..matrix import PackedMatrix
from .native import packed_modules

CHOICES = ("auto", "trit", "int2")


def choose_ternary(rows: int, cols: int, activations: str = "float") -> str:
    """ "trit" or "int2", whichever multiplies faster for a ternary matrix [rows, cols] at the allowed level.

    activations: with "int8" always "trit": BitNet's step is the token's, int2's that of 128 columns.
    """
    level = _C.selected_kernel("matmul", FORMATS["trit"]).partition("__")[2]
    if activations == "int8" or level in ("avx512vnni", "amx"):
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
