"""ONNX Runtime: MatMulNBits, 2, 4 and 8 bits in blocks of 128, at its fp32, bf16 and int8 accuracy levels.

A session holds one model with many independent nodes, a matrix each, so that one run goes through all of them; an
output is cut to one element, so that only the node itself is timed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from peers import Matmul, copies_for

GROUP = 128
LEVELS = {"fp32": 1, "bf16": 3, "int8": 4}
SMALL_GRAPH = 6  # matrices in the graph for many tokens, where a run of all of them would take seconds


def available() -> dict:
    return {"onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__}


class _Weights:
    def __init__(self, bits: int, level: str, cols: int, rows: int, megabytes: int):
        generator = np.random.default_rng(0)
        self.bits, self.level, self.cols, self.rows = bits, level, cols, rows
        blocks = cols // GROUP
        self.codes = generator.integers(0, 256, (rows, blocks, GROUP * bits // 8), dtype=np.uint8)
        self.scales = generator.random(rows * blocks, dtype=np.float32) * np.float32(0.002) + np.float32(0.001)
        self.bytes = self.codes.nbytes + self.scales.nbytes
        self.copies = copies_for(self.bytes, megabytes)
        self.matrices_per_call = self.copies
        self.sessions: dict[tuple, onnxruntime.InferenceSession] = {}

    def _session(self, count: int, whole_output: bool) -> onnxruntime.InferenceSession:
        key = (count, whole_output)
        if key not in self.sessions:
            self.sessions[key] = self._build(*key)
        return self.sessions[key]

    def _build(self, count: int, whole_output: bool) -> onnxruntime.InferenceSession:
        """The weights lie in a file beside the model: a protobuf of this size could not be parsed."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = _threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        with tempfile.TemporaryDirectory() as folder:
            with open(Path(folder) / "weights", "wb") as file:

                def stored(name: str, kind: int, array: np.ndarray) -> onnx.TensorProto:
                    tensor = TensorProto(name=name, data_type=kind, dims=array.shape)
                    tensor.data_location = TensorProto.EXTERNAL
                    file.seek(-file.tell() % 4096, 1)
                    where = {"location": "weights", "offset": file.tell(), "length": array.nbytes}
                    for key, value in where.items():
                        tensor.external_data.add(key=key, value=str(value))
                    file.write(array.data)
                    return tensor

                initializers = [
                    helper.make_tensor(n, TensorProto.INT64, [2], [v, v]) for n, v in (("from", 0), ("to", 1))
                ]
                nodes, outputs = [], []
                settings = {"K": self.cols, "N": self.rows, "bits": self.bits, "block_size": GROUP}
                for i in range(count):
                    codes = np.roll(self.codes, i, axis=0)
                    initializers.append(stored(f"codes{i}", TensorProto.UINT8, codes))
                    initializers.append(stored(f"scales{i}", TensorProto.FLOAT, self.scales))
                    inputs = ["x", f"codes{i}", f"scales{i}"]
                    nodes.append(
                        helper.make_node(
                            "MatMulNBits",
                            inputs,
                            [f"y{i}"],
                            domain="com.microsoft",
                            accuracy_level=LEVELS[self.level],
                            **settings,
                        )
                    )
                    outputs.append(f"y{i}")
                    if not whole_output:
                        nodes.append(helper.make_node("Slice", [f"y{i}", "from", "to"], [f"cut{i}"]))
                        outputs[-1] = f"cut{i}"
            nodes.append(helper.make_node("Concat", outputs, ["out"], axis=0))
            x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", self.cols])
            out = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
            versions = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
            graph = helper.make_graph(nodes, "products", [x], [out], initializers)
            model = helper.make_model(graph, opset_imports=versions, ir_version=9)
            path = Path(folder) / "model.onnx"
            path.write_bytes(model.SerializeToString())
            return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def _activations(self, tokens: int) -> np.ndarray:
        return np.random.default_rng(tokens).standard_normal((tokens, self.cols), dtype=np.float32)

    def calls(self, tokens: int) -> list[Callable]:
        self.matrices_per_call = self.copies if tokens < 16 else min(self.copies, SMALL_GRAPH)
        session = self._session(self.matrices_per_call, False)
        return [partial(session.run, None, {"x": self._activations(tokens)})]

    def warm(self, tokens: int) -> Callable:
        return partial(self._session(1, False).run, None, {"x": self._activations(tokens)})

    def error(self, tokens: int) -> float:
        x = self._activations(tokens)
        per_byte = 8 // self.bits
        codes = np.stack([(self.codes >> (self.bits * i)) & ((1 << self.bits) - 1) for i in range(per_byte)], -1)
        codes = codes.reshape(self.rows, -1, GROUP).astype(np.float64) - (1 << (self.bits - 1))
        dense = (codes * self.scales.reshape(self.rows, -1, 1)).reshape(self.rows, self.cols)
        reference = x.astype(np.float64) @ dense.T
        y = self._session(1, True).run(None, {"x": x})[0]
        return float(np.linalg.norm(y - reference) / np.linalg.norm(reference))


def _threads() -> int:
    import os

    return int(os.environ["OMP_NUM_THREADS"])


def _matmul(bits: int, level: str) -> Matmul:
    name = f"ONNX Runtime {bits}b g{GROUP}, {level} activations"
    return Matmul(name, bits, level == "int8", partial(_Weights, bits, level))


MATMUL = [_matmul(4, "int8"), _matmul(4, "fp32"), _matmul(4, "bf16"), _matmul(2, "int8"), _matmul(8, "int8")]
GATHER: list = []
