"""The GPU's half of abi.py: checked tensors on an NVIDIA GPU in, calls of the C API out.

Work is queued on torch's current stream of the matrix's GPU, and nothing waits for it but what has to tell the host
something: ids under policy "error", codes to be packed, values to be checked.

Memory is torch's, taken and given back within a call. Its allocator hands a block that was freed on a stream to that
stream alone, and while a CUDA graph is captured it serves from the graph's own pool. A workspace kept from call to call
would be in the way there: two graphs, or a graph and eager calls, that hold one address race when they run at the same
time, and a block that outlives a capture is what torch.compile's graphs refuse.
"""

from __future__ import annotations

from collections.abc import Callable

import torch  # before _C, as in abi.py
from torch import Tensor

from lowbit import _C

SLAB_BYTES = 256 << 20  # of rows that are unpacked at a time
_PASS_TOKENS = 16  # of one launch of a decode kernel
_ERROR, _ZERO = 0, 1  # of lowbit_id_policy
_NOTHING = torch.iinfo(torch.int64).max  # what a place is that no kernel has written

_invariant = False


class batch_invariant:
    """Whether row i of a batch gets the bits that it gets alone: `batch_invariant(True)`, or as a context manager.

    Off, which is the default, a product takes the fastest way for its number of tokens: a decode kernel up to 16, a
    tile kernel from 17 on, and for many tokens (some hundreds; all beyond 16 in float32 and for ternary matrices)
    unpacking and torch's dense product. Each of them sums in its own order, so a token's result changes when a batch
    grows from one into the next, and the dense product promises nothing even for one size. Results of up to 16 tokens
    and those of activations="int8" do not depend on the batch in any case.

    On, every product takes the kernel that a single token does, 16 tokens at a time, whatever that costs.

    Holds for the whole process. A CUDA graph keeps the way that was chosen when it was captured.
    """

    def __init__(self, enabled: bool = True):
        global _invariant
        self._before, _invariant = _invariant, bool(enabled)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_) -> None:
        global _invariant
        _invariant = self._before


def torch_device(device: int) -> torch.device:
    return torch.device("cuda", device)


def stream(device: int) -> int:
    """The address of torch's current stream."""
    return torch.cuda.current_stream(device).cuda_stream


def is_capturing(device: int) -> bool:
    """Whether the current stream is being captured, so that the host cannot wait for it."""
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def scratch(device: int, size: int) -> Tensor:
    """uint8 [size] at a multiple of 256, with anything in it."""
    return torch.empty(size, dtype=torch.uint8, device=torch_device(device))


def matmul(
    view: _C.Matrix, x: Tensor, dtype: int, bias: Tensor | None, bias_dtype: int, y: Tensor, activations: int
) -> None:
    """y [tokens, rows] from x [tokens, cols], rows of both contiguous and at any distance."""
    tokens = len(x)
    if tokens == 0:
        return
    kernel, prefers_unpack, *_ = view.cuda_matmul_plan(tokens, dtype, activations)
    if prefers_unpack and not _invariant:
        return _dense(view, x, dtype, bias, y)
    # Of the kernels the tile alone sums in an order that knows of the other tokens.
    step = _PASS_TOKENS if _invariant and kernel.endswith("_tile") else tokens
    for begin in range(0, tokens, step):
        part = slice(begin, begin + step)
        _product(view, x[part], dtype, bias, bias_dtype, y[part], activations)


def _product(view, x, dtype, bias, bias_dtype, y, activations) -> None:
    """The product by lowbit's own kernels."""
    _, _, size, zeroed = view.cuda_matmul_plan(len(x), dtype, activations)
    workspace = scratch(view.device, size)
    if zeroed:
        workspace[:zeroed].zero_()
    view.cuda_matmul(
        stream(view.device),
        x.data_ptr(),
        dtype,
        len(x),
        x.stride(0),
        0 if bias is None else bias.data_ptr(),
        bias_dtype,
        y.data_ptr(),
        y.stride(0),
        activations,
        workspace.data_ptr(),
        size,
    )


def _dense(view: _C.Matrix, x: Tensor, dtype: int, bias: Tensor | None, y: Tensor) -> None:
    """Some rows of the matrix at a time, unpacked to x's dtype, and torch's product."""
    bias = None if bias is None else bias.to(x.dtype)
    step = max(1, SLAB_BYTES // (view.cols * x.element_size()))
    for begin in range(0, view.rows, step):
        end = min(begin + step, view.rows)
        weight = x.new_empty(end - begin, view.cols)
        unpack(view, begin, end, weight, dtype)
        if bias is None:
            torch.mm(x, weight.t(), out=y[:, begin:end])
        else:
            torch.addmm(bias[begin:end], x, weight.t(), out=y[:, begin:end])


def unpack(view: _C.Matrix, begin: int, end: int, out: Tensor, dtype: int) -> None:
    """Rows [begin, end) into out, contiguous [end - begin, cols]."""
    view.cuda_unpack(stream(view.device), begin, end, out.data_ptr(), dtype, view.cols)


def unpack_codes(view: _C.Matrix, begin: int, end: int, out: Tensor) -> None:
    """Codes of rows [begin, end) into out, contiguous uint8 [end - begin, cols]."""
    view.cuda_unpack_codes(stream(view.device), begin, end, out.data_ptr())


def gather(view: _C.Matrix, ids: Tensor, id_dtype: int, policy: int, padding_id: int, out: Tensor, dtype: int) -> None:
    """Rows of contiguous ids into out, contiguous [*ids.shape, cols]."""

    def call(policy: int, first_bad: int) -> None:
        view.cuda_gather(
            stream(view.device),
            ids.data_ptr(),
            id_dtype,
            ids.numel(),
            policy,
            padding_id,
            first_bad,
            out.data_ptr(),
            dtype,
            view.cols,
        )

    _with_policy(view, ids, policy, call)


def gather_bags(
    view: _C.Matrix,
    ids: Tensor,
    id_dtype: int,
    offsets: Tensor,
    weights: Tensor | None,
    mean: bool,
    policy: int,
    padding_id: int,
    out: Tensor,
    dtype: int,
) -> None:
    """Sums or means of the rows of contiguous ids [count] into out, contiguous [bags, cols]."""

    def call(policy: int, first_bad: int) -> None:
        view.cuda_gather_bags(
            stream(view.device),
            ids.data_ptr(),
            id_dtype,
            ids.numel(),
            offsets.data_ptr(),
            len(out),
            0 if weights is None else weights.data_ptr(),
            mean,
            policy,
            padding_id,
            first_bad,
            out.data_ptr(),
            dtype,
            view.cols,
        )

    _with_policy(view, ids, policy, call)


def _with_policy(view: _C.Matrix, ids: Tensor, policy: int, call: Callable[[int, int], None]) -> None:
    """call(policy, address of the first bad place). "error" waits for what was found; while a graph is captured nothing
    can be waited for, and ids outside give zeros."""
    if policy == _ERROR and (ids.numel() == 0 or is_capturing(view.device)):
        policy = _ZERO
    if policy != _ERROR:
        call(policy, 0)
        return
    found = _places(view.device, 1)
    call(_ERROR, found.data_ptr())
    place = int(found)
    if place != _NOTHING:
        raise IndexError(f"ids[{place}]: expected a row in [0, {view.rows}), got {int(ids.flatten()[place])}")


def _places(device: int, count: int) -> Tensor:
    return torch.full((count,), _NOTHING, dtype=torch.int64, device=torch_device(device))


def pack_codes(view: _C.Matrix, codes: Tensor, lines: Tensor, largest: int) -> None:
    """Lines [rows, lines, 64] of contiguous uint8 codes [rows, cols]. Waits; IndexError: a code above `largest`."""
    found = _places(view.device, 1)
    view.cuda_pack_codes(stream(view.device), codes.data_ptr(), lines.data_ptr(), found.data_ptr())
    place = int(found)
    if place != _NOTHING:
        row, col = divmod(place, view.cols)
        raise IndexError(f"codes[{row}, {col}]: expected at most {largest}, got {int(codes[row, col])}")


def check(view: _C.Matrix, codes: Tensor, scales: Tensor, zeros: Tensor | None, perm: Tensor | None, largest: int):
    """Waits, and raises the ValueError that the CPU's check of values would."""
    found = _places(view.device, 4)
    workspace = scratch(view.device, 0 if perm is None else 4 * view.cols)
    view.cuda_check(stream(view.device), found.data_ptr(), workspace.data_ptr(), workspace.numel())
    scale, zero, column, byte = found.tolist()
    if column != _NOTHING and not 0 <= int(perm[column]) < view.cols:
        raise ValueError(f"perm[{column}]: expected a column in [0, {view.cols}), got {int(perm[column])}")
    if scale != _NOTHING:
        row, group = divmod(scale, scales.shape[1])
        value = float(scales[row, group])
        expected = "a number other than 0, got 0" if value == 0 else f"a finite number, got {value:g}"
        raise ValueError(f"scales[{row}, {group}]: expected {expected}")
    if zero != _NOTHING:
        row, group = divmod(zero, zeros.shape[1])
        raise ValueError(f"zeros[{row}, {group}]: expected at most {largest}, got {int(zeros[row, group])}")
    if byte != _NOTHING:
        line, at = divmod(byte, codes.shape[2])
        row, line = divmod(line, codes.shape[1])
        raise ValueError(
            f"codes[{row}, {line}, {at}]: expected a byte of five trits, got {int(codes[row, line, at])}, one of the "
            "13 that none are stored as"
        )
    if column != _NOTHING:
        raise ValueError(f"perm: expected every column once, got {int(perm[column])} again at {column}")


def gptq_solve(device: int, options: dict[str, int], addresses: dict[str, int]) -> None:
    """`_C.gptq_solve` with tensors on a GPU, whose numbers the caller has checked."""
    size = _C.cuda_gptq_workspace(**options)
    workspace = scratch(device, size)
    _C.cuda_gptq_solve(
        device=device,
        stream=stream(device),
        **options,
        **addresses,
        workspace=workspace.data_ptr(),
        workspace_bytes=size,
    )


__all__ = ["batch_invariant"]
