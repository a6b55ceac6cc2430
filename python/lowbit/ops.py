"""The verbs as torch operators: torch.ops.lowbit.matmul, gather, gather_bags and unpack.

Registered with torch.library from Python: shapes for the compiler (fakes), gradients for LoRA, and calls into the C API
over data pointers. Nothing is linked against torch, so no torch release can break it. One implementation serves CPU and
CUDA tensors: abi.py goes where the matrix is.

Where torch has the stable C ABI of 2.10 the plain case of matmul and gather on the CPU needs no Python: a kernel of _C
(csrc/python/torch_kernels.cpp) takes it, and passes everything else and every error on to the operators in Python
under the names _matmul and _gather. LOWBIT_TORCH_KERNELS=python in the environment leaves all to Python.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from lowbit import _C, abi

_MATRIX = "Tensor codes, Tensor scales, Tensor? zeros, Tensor? perm"
_LAYOUT = "str format, int cols, int group_size"

library = torch.library.Library("lowbit", "DEF")
for _name in ("matmul", "_matmul"):
    library.define(f"{_name}(Tensor x, {_MATRIX}, Tensor? bias, {_LAYOUT}, str activations) -> Tensor")
for _name in ("gather", "_gather"):
    library.define(
        f"{_name}(Tensor ids, {_MATRIX}, {_LAYOUT}, ScalarType dtype, str policy, int? padding_id=None) -> Tensor"
    )
library.define(
    f"gather_bags(Tensor ids, Tensor offsets, {_MATRIX}, {_LAYOUT}, ScalarType dtype, str mode, str policy, "
    "int? padding_id=None, Tensor? weights=None) -> Tensor"
)
library.define(f"unpack({_MATRIX}, {_LAYOUT}, ScalarType dtype) -> Tensor")

_NATIVE = os.environ.get("LOWBIT_TORCH_KERNELS") != "python" and _C.register_torch_kernels(
    str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")
)


def _implements(name: str):
    def register(function):
        library.impl(name, function, "CUDA")
        if not _NATIVE or name not in ("matmul", "gather"):
            library.impl(name, function, "CPU")
        return function

    return register


def _takes_over(name: str):
    """Makes the operator in Python that the kernel of _C passes calls on to. An error is kept for the kernel to raise,
    because torch's C functions would make another one of it."""

    def register(function):
        def call(*arguments):
            try:
                return function(*arguments)
            except BaseException as error:
                _C.keep_error(error)
                return torch.empty(0)

        library.impl(f"_{name}", call, "CPU")
        library.impl(f"_{name}", torch.library.fallthrough_kernel, "Autograd")
        return function

    return register


@_takes_over("matmul")
@_implements("matmul")
def _matmul(x, codes, scales, zeros, perm, bias, format, cols, group_size, activations):
    view = abi.known_view(codes, scales, zeros, perm, format, cols, group_size)
    return abi.matmul(view, x, bias, activations)


@torch.library.register_fake("lowbit::matmul", lib=library)
def _matmul_fake(x, codes, scales, zeros, perm, bias, format, cols, group_size, activations):
    abi.check_operands(x, bias, codes.shape[0], cols)
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@_takes_over("gather")
@_implements("gather")
def _gather(ids, codes, scales, zeros, perm, format, cols, group_size, dtype, policy, padding_id=None):
    view = abi.known_view(codes, scales, zeros, perm, format, cols, group_size)
    return abi.gather(view, ids, dtype, policy, padding_id)


@torch.library.register_fake("lowbit::gather", lib=library)
def _gather_fake(ids, codes, scales, zeros, perm, format, cols, group_size, dtype, policy, padding_id=None):
    return codes.new_empty((*ids.shape, cols), dtype=dtype)


@_implements("gather_bags")
def _bags(
    ids,
    offsets,
    codes,
    scales,
    zeros,
    perm,
    format,
    cols,
    group_size,
    dtype,
    mode,
    policy,
    padding_id=None,
    weights=None,
):
    view = abi.known_view(codes, scales, zeros, perm, format, cols, group_size)
    return abi.gather_bags(view, ids, offsets, dtype, mode, policy, padding_id, weights)


@torch.library.register_fake("lowbit::gather_bags", lib=library)
def _bags_fake(
    ids,
    offsets,
    codes,
    scales,
    zeros,
    perm,
    format,
    cols,
    group_size,
    dtype,
    mode,
    policy,
    padding_id=None,
    weights=None,
):
    return codes.new_empty((offsets.shape[0] - 1, cols), dtype=dtype)


@_implements("unpack")
def _unpack(codes, scales, zeros, perm, format, cols, group_size, dtype):
    view = abi.known_view(codes, scales, zeros, perm, format, cols, group_size)
    return abi.unpack(view, 0, codes.shape[0], dtype)


@torch.library.register_fake("lowbit::unpack", lib=library)
def _unpack_fake(codes, scales, zeros, perm, format, cols, group_size, dtype):
    return codes.new_empty((codes.shape[0], cols), dtype=dtype)


# The weight is frozen; the input's gradient is what LoRA needs: dL/dx = dL/dy W, and dL/dbias sums over tokens.


def _matmul_setup(ctx, inputs, output):
    x, codes, scales, zeros, perm, bias, *layout, _ = inputs
    ctx.save_for_backward(codes, scales, zeros, perm)
    ctx.layout, ctx.x_dtype, ctx.bias_dtype = layout, x.dtype, None if bias is None else bias.dtype


def _matmul_backward(ctx, grad):
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        weight = torch.ops.lowbit.unpack(*ctx.saved_tensors, *ctx.layout, grad.dtype)
        dx = (grad @ weight).to(ctx.x_dtype)
    if ctx.needs_input_grad[5]:
        dbias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return dx, None, None, None, None, dbias, None, None, None, None


torch.library.register_autograd("lowbit::matmul", _matmul_backward, setup_context=_matmul_setup, lib=library)


# The weights of a bag's rows are the one float that goes into it: dL/dweights[i] = dL/dout[bag of i] . W[ids[i]].


def _bags_setup(ctx, inputs, output):
    ids, offsets, codes, scales, zeros, perm, *layout, _dtype, _mode, policy, padding_id, weights = inputs
    ctx.save_for_backward(ids, offsets, codes, scales, zeros, perm)
    ctx.layout, ctx.policy, ctx.padding_id = layout, policy, padding_id
    ctx.weights_dtype = None if weights is None else weights.dtype


def _bags_backward(ctx, grad):
    if ctx.weights_dtype is None:
        return (None,) * 14
    ids, offsets, *matrix = ctx.saved_tensors
    bag = torch.bucketize(torch.arange(len(ids), device=ids.device), offsets, right=True) - 1
    grad = torch.nn.functional.pad(grad, (0, 0, 0, 1))  # a row of zeros for ids in no bag, whose bag is -1 or the last
    policy = "clamp" if ctx.policy == "clamp" else "zero"  # under "error" all ids in bags were good
    rows = torch.ops.lowbit.gather(ids, *matrix, *ctx.layout, torch.float32, policy, ctx.padding_id)
    return (*(None,) * 13, (rows * grad[bag]).sum(-1).to(ctx.weights_dtype))


torch.library.register_autograd("lowbit::gather_bags", _bags_backward, setup_context=_bags_setup, lib=library)

# Gather and unpack read frozen integers: no input has a gradient, and passing through costs nothing (a function that
# says so would cost as much as a lookup).
for _name in ("gather", "unpack"):
    library.impl(_name, torch.library.fallthrough_kernel, "Autograd")

__all__ = ["library"]
