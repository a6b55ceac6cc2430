"""OpenVINO: a weight-compressed MatMul (u4 with zero points, groups of 128), bf16 or f32, and dynamic quantization.

One model holds many independent products, a matrix each, so that one inference goes through all of them. Dynamic
quantization of the activations must be asked for: f32 precision and a group size.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

import numpy as np
import openvino as ov
from openvino import Shape, Type
from openvino import opset13 as op

from peers import Matmul, copies_for

GROUP = 128
SETTINGS = {
    "f32": {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"},
    "bf16": {"INFERENCE_PRECISION_HINT": "bf16", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"},
    "dynamic int8": {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "128"},
}
SMALL_GRAPH = 6  # matrices in the graph for many tokens, where an inference of all of them would take seconds


def available() -> dict:
    return {"openvino": ov.__version__}


def _nibbles(packed: np.ndarray, shape: tuple) -> np.ndarray:
    return np.stack([packed & 15, packed >> 4], -1).reshape(shape).astype(np.float64)


class _Weights:
    def __init__(self, mode: str, cols: int, rows: int, megabytes: int):
        generator = np.random.default_rng(0)
        self.mode, self.cols, self.rows, self.groups = mode, cols, rows, cols // GROUP
        self.codes = generator.integers(0, 256, rows * cols // 2, dtype=np.uint8)
        self.scales = (generator.random((rows, self.groups, 1)) * 0.002 + 0.001).astype(np.float16)
        self.zeros = generator.integers(0, 256, rows * self.groups // 2, dtype=np.uint8)
        self.bytes = self.codes.nbytes + self.scales.nbytes + self.zeros.nbytes
        self.copies = copies_for(self.bytes, megabytes)
        self.matrices_per_call = self.copies
        self.requests: dict[int, ov.InferRequest] = {}
        self.kept: list[np.ndarray] = []  # ov.Tensor shares an array's memory, which is read at the first inference

    def _request(self, count: int) -> ov.InferRequest:
        if count not in self.requests:
            self.requests[count] = self._build(count)
        return self.requests[count]

    def _build(self, count: int) -> ov.InferRequest:
        x = op.parameter([-1, self.cols], np.float32)
        shape, outputs = [self.rows, self.groups], []
        for i in range(count):
            codes = np.roll(self.codes, 64 * i)
            self.kept.append(codes)
            w = op.convert(op.constant(ov.Tensor(codes, Shape([*shape, GROUP]), Type.u4)), np.float16)
            zeros = op.convert(op.constant(ov.Tensor(self.zeros, Shape([*shape, 1]), Type.u4)), np.float16)
            w = op.multiply(op.subtract(w, zeros), op.constant(self.scales))
            w = op.reshape(w, op.constant(np.array([self.rows, self.cols])), False)
            outputs.append(op.result(op.matmul(x, op.convert(w, np.float32), False, True)))
        settings = {"INFERENCE_NUM_THREADS": os.environ["OMP_NUM_THREADS"], "NUM_STREAMS": "1", **SETTINGS[self.mode]}
        return ov.Core().compile_model(ov.Model(outputs, [x]), "CPU", settings).create_infer_request()

    def _activations(self, tokens: int) -> np.ndarray:
        return np.random.default_rng(tokens).standard_normal((tokens, self.cols), dtype=np.float32)

    def _infer(self, count: int, x: np.ndarray) -> np.ndarray:
        request = self._request(count)
        request.set_input_tensor(ov.Tensor(x))
        request.infer()
        return request.get_output_tensor(0).data

    def calls(self, tokens: int) -> list[Callable]:
        self.matrices_per_call = self.copies if tokens < 16 else min(self.copies, SMALL_GRAPH)
        return [partial(self._infer, self.matrices_per_call, self._activations(tokens))]

    def warm(self, tokens: int) -> Callable:
        return partial(self._infer, 1, self._activations(tokens))

    def error(self, tokens: int) -> float:
        x = self._activations(tokens)
        shape = (self.rows, self.groups, GROUP)
        centred = _nibbles(self.codes, shape) - _nibbles(self.zeros, (self.rows, self.groups, 1))
        dense = (centred * self.scales.astype(np.float64)).reshape(self.rows, self.cols)
        reference = x.astype(np.float64) @ dense.T
        return float(np.linalg.norm(self._infer(1, x) - reference) / np.linalg.norm(reference))


def _matmul(mode: str) -> Matmul:
    return Matmul(f"OpenVINO u4 g{GROUP}, {mode}", 4, mode == "dynamic int8", partial(_Weights, mode))


MATMUL = [_matmul(mode) for mode in SETTINGS]
GATHER: list = []
