"""Tensors in, calls of the C API out: the checks and the address arithmetic that every verb shares.

Tensors lie on the CPU or on an NVIDIA GPU, all of a call on the same one; where it is a GPU, the call goes on in
cuda.py. What tensors mean to users is in matrix.py, what they mean to torch in ops.py.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch  # before _C, so that the process has torch's OpenMP runtime and no second one
from torch import Tensor

from lowbit import _C, cuda

# By their lowbit_format: the width of an integer format, 1 for five ternary digits a byte.
FORMATS = {"int2": 2, "int3": 3, "int4": 4, "int8": 8, "trit": 1}
SCALE_DTYPES = {torch.float32: _C.F32, torch.float16: _C.F16, torch.bfloat16: _C.BF16}
FLOAT_DTYPES = SCALE_DTYPES
ID_DTYPES = {torch.int32: _C.I32, torch.int64: _C.I64}
ACTIVATIONS = {"float": 0, "int8": 1}
ID_POLICIES = {"error": 0, "zero": 1, "clamp": 2}
BAG_MODES = {"sum": 0, "mean": 1}
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


def largest_code(format: str) -> int:
    return 2 if format == "trit" else (1 << FORMATS[format]) - 1


def empty_codes(rows: int, lines: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Zeroed uint8 [rows, lines, 64], 64-byte aligned; on the CPU on huge pages where the system gives them."""
    if torch.device(device).type != "cpu":
        return torch.zeros(rows, lines, LINE_BYTES, dtype=torch.uint8, device=device)
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
    device = device_index(codes, "codes")
    for name, tensor in (("codes", codes), ("scales", scales), ("zeros", zeros), ("perm", perm)):
        if tensor is None:
            continue
        require_device(tensor, name, device)
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
        device=device,
    )


# The matrices that are alive, by the id of their codes, which they keep alive.
_matrices: dict[int, weakref.ref] = {}


def remember(matrix, codes: Tensor) -> None:
    """Lets `recall` find the PackedMatrix over these codes, as long as it lives."""
    key = id(codes)
    _matrices[key] = weakref.ref(matrix, lambda gone: _matrices.get(key) is gone and _matrices.pop(key))


def recall(codes: Tensor):
    """The last PackedMatrix made over a tensor object as its codes, or None."""
    found = _matrices.get(id(codes))
    matrix = None if found is None else found()
    return matrix if matrix is not None and matrix._tensors[0] is codes else None


def known_view(codes, scales, zeros, perm, format: str, cols: int, group_size: int) -> _C.Matrix:
    """`matrix_view`, or the view that the PackedMatrix over just these tensors has: an operator's call pays for it
    otherwise."""
    matrix = recall(codes)
    if matrix is not None and matrix._matrix is not None:
        _, own_scales, own_zeros, own_perm = matrix._tensors
        layout = matrix.layout
        same = own_scales is scales and own_zeros is zeros and own_perm is perm
        if same and (layout.format, layout.cols, layout.group_size) == (format, cols, group_size):
            return matrix._matrix
    return matrix_view(codes, scales, zeros, perm, Layout(format, cols, group_size))


def check_matrix(view: _C.Matrix, codes, scales, zeros, perm, layout: Layout, values: bool) -> None:
    """Raises ValueError unless shapes and (with `values`) scales, zeros, perm and ternary bytes are those of a matrix.
    On a GPU the values are waited for."""
    view.check(values)
    if values and view.device >= 0:
        cuda.check(view, codes, scales, zeros, perm, largest_code(layout.format))


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
    rows, cols, device = view.rows, view.cols, view.device
    check_operands(x, bias, rows, cols)
    require_device(x, "x", device)
    bias_address, bias_dtype = 0, 0
    if bias is not None:
        require_device(bias, "bias", device)
        bias = bias.contiguous()
        bias_address, bias_dtype = bias.data_ptr(), lookup(FLOAT_DTYPES, bias.dtype, "bias dtype")
    mode = lookup(ACTIVATIONS, activations, "activations")
    # Made in its final shape: a view could not be changed in place under autograd, as residual additions do.
    y = x.new_empty((*x.shape[:-1], rows))
    if device >= 0:
        cuda.matmul(view, _rows_apart(x), FLOAT_DTYPES[x.dtype], bias, bias_dtype, y.view(-1, rows), mode)
        return y
    x = x if x.is_contiguous() else x.contiguous()
    view.matmul(
        x.data_ptr(), FLOAT_DTYPES[x.dtype], x.numel() // cols, cols, bias_address, bias_dtype, y.data_ptr(), rows, mode
    )
    return y


def matmul_group(views: list[_C.Matrix], x: Tensor, biases: list[Tensor | None], activations: str) -> list[Tensor]:
    """x [..., cols] -> [..., rows] of each matrix, in x's dtype: the bits of `matmul`, in one call on the CPU."""
    if x.is_cuda or len(views) > _C.MAX_GROUP:
        return [matmul(view, x, bias, activations) for view, bias in zip(views, biases, strict=True)]
    mode, sides = lookup(ACTIVATIONS, activations, "activations"), []
    biases = [None if bias is None else bias.contiguous() for bias in biases]
    for view, bias in zip(views, biases, strict=True):
        check_operands(x, bias, view.rows, view.cols)
        require_device(x, "x", view.device)
        if bias is None:
            sides.append((0, 0))
        else:
            require_device(bias, "bias", view.device)
            sides.append((bias.data_ptr(), lookup(FLOAT_DTYPES, bias.dtype, "bias dtype")))
    x = x if x.is_contiguous() else x.contiguous()
    ys = [x.new_empty((*x.shape[:-1], view.rows)) for view in views]
    cols = x.shape[-1]
    addresses = [y.data_ptr() for y in ys]
    _C.matmul_group(views, sides, addresses, x.data_ptr(), FLOAT_DTYPES[x.dtype], x.numel() // cols, cols, mode)
    return ys


def _rows_apart(x: Tensor) -> Tensor:
    """x [..., cols] as [tokens, cols] with contiguous rows that do not overlap: a view where there is one."""
    cols = x.shape[-1]
    x = x.reshape(-1, cols)
    return x if x.stride(1) == 1 and x.stride(0) >= cols else x.contiguous()


def gather(
    view: _C.Matrix,
    ids: Tensor,
    dtype: torch.dtype,
    policy: str,
    padding_id: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """ids [...] int32 or int64 -> rows [..., cols] in `dtype`, or into `out`, contiguous and of that shape; zeros where
    an id is padding_id."""
    ids, id_dtype, policy_code, padding = _ids(view, ids, policy, padding_id)
    cols, device = view.cols, view.device
    if out is None:
        out_dtype = lookup(FLOAT_DTYPES, dtype, "dtype")
        out = ids.new_empty((*ids.shape, cols), dtype=dtype)
    elif list(out.shape) != [*ids.shape, cols] or not out.is_contiguous():
        raise ValueError(f"out: expected a contiguous {[*ids.shape, cols]}, got {list(out.shape)} {out.stride()}")
    else:
        require_device(out, "out", device)
        out_dtype = lookup(FLOAT_DTYPES, out.dtype, "dtype")
    if device >= 0:
        cuda.gather(view, ids, id_dtype, policy_code, padding, out, out_dtype)
        return out
    view.gather(ids.data_ptr(), id_dtype, ids.numel(), policy_code, out.data_ptr(), out_dtype, cols)
    return out if padding_id is None else out.masked_fill_((ids == padding_id)[..., None], 0)


def gather_bags(
    view: _C.Matrix,
    ids: Tensor,
    offsets: Tensor,
    dtype: torch.dtype,
    mode: str,
    policy: str,
    padding_id: int | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """ids [count], offsets int64 [bags + 1], weights [count] -> sums or means [bags, cols] in `dtype`, added in float32
    in order."""
    ids, id_dtype, policy_code, padding = _ids(view, ids, policy, padding_id)
    mean = lookup(BAG_MODES, mode, "mode") == 1
    out_dtype = lookup(FLOAT_DTYPES, dtype, "dtype")
    require_device(offsets, "offsets", view.device)
    if ids.ndim != 1:
        raise ValueError(f"ids: expected 1 dimension, got {ids.ndim}")
    if offsets.dtype != torch.int64 or offsets.ndim != 1 or len(offsets) == 0:
        raise ValueError(f"offsets: expected torch.int64 [bags + 1], got {offsets.dtype} {list(offsets.shape)}")
    offsets = offsets.contiguous()
    weights = None if weights is None else _bag_weights(view, ids, weights, mode)
    out = ids.new_empty((len(offsets) - 1, view.cols), dtype=dtype)
    if view.device >= 0:
        cuda.gather_bags(view, ids, id_dtype, offsets, weights, mean, policy_code, padding, out, out_dtype)
        return out
    view.gather_bags(
        ids.data_ptr(),
        id_dtype,
        len(ids),
        offsets.data_ptr(),
        len(out),
        0 if weights is None else weights.data_ptr(),
        mean,
        policy_code,
        padding,
        out.data_ptr(),
        out_dtype,
        view.cols,
    )
    return out


def _bag_weights(view: _C.Matrix, ids: Tensor, weights: Tensor, mode: str) -> Tensor:
    """Contiguous float32 weights of the rows of bags, after the checks of them."""
    if mode != "sum":
        raise NotImplementedError(f'weights: expected mode "sum" with them, got {mode!r}')
    lookup(FLOAT_DTYPES, weights.dtype, "weights dtype")
    require_device(weights, "weights", view.device)
    if weights.shape != ids.shape:
        raise ValueError(f"weights: expected one an id, {list(ids.shape)}, got {list(weights.shape)}")
    return weights.to(torch.float32).contiguous()


def _ids(view: _C.Matrix, ids: Tensor, policy: str, padding_id: int | None) -> tuple[Tensor, int, int, int]:
    """What every gather checks: contiguous ids, their dtype's number, the policy's, and the padding id (-1: none)."""
    require_device(ids, "ids", view.device)
    if padding_id is not None and not 0 <= padding_id < view.rows:
        raise ValueError(f"padding_id: expected a row in [0, {view.rows}) or None, got {padding_id}")
    ids = ids if ids.is_contiguous() else ids.contiguous()
    padding = -1 if padding_id is None else padding_id
    return ids, lookup(ID_DTYPES, ids.dtype, "ids dtype"), lookup(ID_POLICIES, policy, "policy"), padding


def unpack(view: _C.Matrix, begin: int, end: int, dtype: torch.dtype) -> Tensor:
    """Rows [begin, end) as dense [end - begin, cols]."""
    number = lookup(FLOAT_DTYPES, dtype, "dtype")
    out = torch.empty(end - begin, view.cols, dtype=dtype, device=_torch_device(view.device))
    if view.device >= 0:
        cuda.unpack(view, begin, end, out, number)
    else:
        view.unpack(begin, end, out.data_ptr(), number, view.cols)
    return out


def unpack_codes(view: _C.Matrix, begin: int, end: int) -> Tensor:
    """Codes of rows [begin, end), uint8 [end - begin, cols]."""
    out = torch.empty(end - begin, view.cols, dtype=torch.uint8, device=_torch_device(view.device))
    if view.device >= 0:
        cuda.unpack_codes(view, begin, end, out)
    else:
        view.unpack_codes(begin, end, out.data_ptr())
    return out


def pack_codes(view: _C.Matrix, codes: Tensor, lines: Tensor, format: str) -> None:
    """Contiguous codes uint8 [rows, cols] into lines. IndexError: a code that the format lacks."""
    require_device(codes, "codes", view.device)
    if view.device >= 0:
        cuda.pack_codes(view, codes, lines, largest_code(format))
    else:
        view.pack_codes(codes.data_ptr(), lines.data_ptr())


def gptq_solve(options: dict[str, int], tensors: dict[str, Tensor | None]) -> None:
    """The column solver where its tensors are: weight, factor, group_index, codes, scales, zeros, loss (lowbit.h). On a
    GPU their numbers are the caller's to check."""
    device = device_index(tensors["weight"], "weight")
    for name, tensor in tensors.items():
        if tensor is not None:
            require_device(tensor, name, device)
    addresses = {name: 0 if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()}
    if device >= 0:
        cuda.gptq_solve(device, options, addresses)
    else:
        _C.gptq_solve(**options, **addresses)


def device_index(tensor: Tensor, name: str) -> int:
    """-1 for a tensor on the CPU, the index of its GPU for one on a GPU. NotImplementedError: it lies elsewhere."""
    if tensor.is_cpu:
        return -1
    if tensor.is_cuda:
        return tensor.get_device()
    raise NotImplementedError(f"{name}: expected a tensor on the CPU or on an NVIDIA GPU, got {tensor.device}")


def require_device(tensor: Tensor, name: str, device: int) -> None:
    """Raises ValueError unless a tensor lies where the matrix does."""
    if device_index(tensor, name) != device:
        expected = "cpu" if device < 0 else f"cuda:{device}"
        raise ValueError(f"{name}: expected a tensor on {expected}, where the matrix is, got {tensor.device}")


def _torch_device(device: int) -> torch.device | None:
    return None if device < 0 else cuda.torch_device(device)


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
