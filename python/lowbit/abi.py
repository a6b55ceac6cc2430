"""Tensors in, calls of the C API out: the checks and the address arithmetic that every verb shares.

Everything below takes plain CPU tensors; what they mean to users is in matrix.py, what they mean to torch in ops.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch  # before _C, so that the process has torch's OpenMP runtime and no second one
from torch import Tensor

from lowbit import _C

# By their lowbit_format: the width of an integer format, 1 for five ternary digits a byte.
FORMATS = {"int2": 2, "int3": 3, "int4": 4, "int8": 8, "trit": 1}
SCALE_DTYPES = {torch.float32: _C.F32, torch.float16: _C.F16, torch.bfloat16: _C.BF16}
FLOAT_DTYPES = SCALE_DTYPES
ID_DTYPES = {torch.int32: _C.I32, torch.int64: _C.I64}
ACTIVATIONS = {"float": 0, "int8": 1}
ID_POLICIES = {"error": 0, "zero": 1, "clamp": 2}
LINE_BYTES = 64


def format_bits(format: str) -> int:
    """A format's number in the C API: the width of an integer format's codes. Raises ValueError for an unknown name."""
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    return FORMATS[format]


def normalise_group_size(group_size: int, cols: int) -> int:
    """-1 becomes `cols`. Raises ValueError for anything but a multiple of 16 up to cols, or cols."""
    group_size = cols if group_size == -1 else group_size
    if group_size != cols and not (16 <= group_size <= cols and group_size % 16 == 0):
        raise ValueError(f"group_size: expected -1, a multiple of 16 up to cols ({cols}), or cols, got {group_size}")
    return group_size


def empty_codes(rows: int, lines: int) -> torch.Tensor:
    """Zeroed uint8 [rows, lines, 64] on the CPU, 64-byte aligned and on huge pages where the system gives them."""
    size = rows * lines * LINE_BYTES
    return torch.frombuffer(_C.Buffer(size), dtype=torch.uint8, count=size).view(rows, lines, LINE_BYTES)


def lookup(table: dict, key, name: str) -> int:
    """table[key], or a ValueError/TypeError that lists what was expected."""
    try:
        return table[key]
    except KeyError:
        error = TypeError if isinstance(key, torch.dtype) else ValueError
        raise error(f"{name}: expected one of {', '.join(map(str, table))}, got {key!r}") from None


@dataclass(frozen=True)
class Layout:
    """How to read a matrix's bytes: what a kernel needs beside the tensors."""

    format: str
    cols: int
    group_size: int


def matrix_view(codes, scales, zeros, perm, layout: Layout) -> _C.Matrix:
    """A `_C.Matrix` over the tensors' memory, after checking their types and shapes.

    Cheap: no value is read (perm's range is checked by the verbs), so ops build one a call. The caller keeps the
    tensors alive.
    """
    bits = format_bits(layout.format)
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes: expected dtype torch.uint8, got {codes.dtype}")
    lines = _C.row_lines(bits, layout.cols)
    if codes.ndim != 3 or codes.shape[1] != lines or codes.shape[2] != LINE_BYTES:
        raise ValueError(
            f"codes: expected shape [rows, {lines}, {LINE_BYTES}] for {layout.format} with {layout.cols} columns, "
            f"got {list(codes.shape)}"
        )
    if scales.ndim != 2:
        raise ValueError(f"scales: expected 2 dimensions, got {scales.ndim}")
    for name, tensor in (("codes", codes), ("scales", scales), ("zeros", zeros), ("perm", perm)):
        if tensor is None:
            continue
        require_cpu(tensor, name)
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")
    if zeros is not None and (zeros.dtype != torch.uint8 or zeros.shape != scales.shape):
        raise ValueError(
            f"zeros: expected torch.uint8 of the scales' shape {list(scales.shape)}, "
            f"got {zeros.dtype} {list(zeros.shape)}"
        )
    if perm is not None and (perm.dtype != torch.int32 or list(perm.shape) != [layout.cols]):
        raise ValueError(f"perm: expected torch.int32 [{layout.cols}], got {perm.dtype} {list(perm.shape)}")
    return _C.Matrix(
        format=bits,
        rows=codes.shape[0],
        cols=layout.cols,
        group_size=layout.group_size,
        codes=codes.data_ptr(),
        scales=scales.data_ptr(),
        scale_dtype=lookup(SCALE_DTYPES, scales.dtype, "scales dtype"),
        scale_rows=scales.shape[0],
        scale_cols=scales.shape[1],
        zeros=0 if zeros is None else zeros.data_ptr(),
        perm=0 if perm is None else perm.data_ptr(),
    )


def check_operands(x: Tensor, bias: Tensor | None, rows: int, cols: int) -> None:
    """Raises TypeError or ValueError unless x is [..., cols] of a float dtype and bias is None or [rows]."""
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"x: expected float32, float16 or bfloat16, got {x.dtype}")
    if x.ndim < 1 or x.shape[-1] != cols:
        raise ValueError(f"x: expected {cols} columns (in_features), got shape {list(x.shape)}")
    if bias is not None and (bias.ndim != 1 or bias.shape[0] != rows):
        raise ValueError(f"bias: expected shape [{rows}], got {list(bias.shape)}")


def matmul(view: _C.Matrix, x: Tensor, bias: Tensor | None, activations: str) -> Tensor:
    """x [..., cols] -> [..., rows], in x's dtype."""
    rows, cols = view.rows, view.cols
    check_operands(x, bias, rows, cols)
    require_cpu(x, "x")
    x = x if x.is_contiguous() else x.contiguous()
    # Made in its final shape: a view could not be changed in place under autograd, as residual additions do.
    y = torch.empty((*x.shape[:-1], rows), dtype=x.dtype)
    bias_address, bias_dtype = 0, 0
    if bias is not None:
        bias = bias.contiguous()
        bias_address, bias_dtype = bias.data_ptr(), lookup(FLOAT_DTYPES, bias.dtype, "bias dtype")
    mode = lookup(ACTIVATIONS, activations, "activations")
    view.matmul(
        x.data_ptr(), FLOAT_DTYPES[x.dtype], x.numel() // cols, cols, bias_address, bias_dtype, y.data_ptr(), rows, mode
    )
    return y


def gather(view: _C.Matrix, ids: Tensor, dtype: torch.dtype, policy: str, out: Tensor | None = None) -> Tensor:
    """ids [...] int32 or int64 -> rows [..., cols] in `dtype`, or into `out`, contiguous and of that shape."""
    require_cpu(ids, "ids")
    ids = ids if ids.is_contiguous() else ids.contiguous()
    id_dtype = lookup(ID_DTYPES, ids.dtype, "ids dtype")
    if out is None:
        out = torch.empty((*ids.shape, view.cols), dtype=dtype)
    elif list(out.shape) != [*ids.shape, view.cols] or not out.is_contiguous():
        raise ValueError(f"out: expected a contiguous {[*ids.shape, view.cols]}, got {list(out.shape)} {out.stride()}")
    out_dtype = lookup(FLOAT_DTYPES, out.dtype, "dtype")
    policy_code = lookup(ID_POLICIES, policy, "policy")
    view.gather(ids.data_ptr(), id_dtype, ids.numel(), policy_code, out.data_ptr(), out_dtype, view.cols)
    return out


def unpack(view: _C.Matrix, begin: int, end: int, dtype: torch.dtype) -> Tensor:
    """Rows [begin, end) as dense [end - begin, cols]."""
    out = torch.empty(end - begin, view.cols, dtype=dtype)
    view.unpack(begin, end, out.data_ptr(), lookup(FLOAT_DTYPES, dtype, "dtype"), view.cols)
    return out


def require_cpu(tensor: Tensor, name: str) -> None:
    if not tensor.is_cpu:
        raise NotImplementedError(
            f"{name}: expected a CPU tensor (this build has no CUDA library), got {tensor.device}"
        )


# A torch without this query takes the operator's path every time, which is right and slower.
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)


def runs_eagerly(x: Tensor, bias: Tensor | None = None) -> bool:
    """Whether a verb may be called directly, without torch's dispatcher, which costs more than a small product.

    Not while something watches or transforms operators (compile, export, fake tensors, dispatch modes), and not when a
    gradient is asked for.
    """
    if torch.compiler.is_compiling() or type(x) is not Tensor or _dispatch_modes():
        return False
    needs_grad = x.requires_grad or (bias is not None and bias.requires_grad)
    return not (needs_grad and torch.is_grad_enabled())
