"""The subjects of the benchmarks: lowbit (ours.py) and the peers, one file a library, all with the same interface.

A file offers available() -> {library: version} (raising ImportError with the reason when it is not installed), MATMUL:
a list of Matmul, GATHER: a list of Gather, and where it sums embedding bags, BAGS: a list of Gather again. Whatever a
library calls its parts, here K is cols (in_features) and N is rows (out_features).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

MODULES = ("ours", "torch", "onnxruntime", "openvino", "bitsandbytes", "vllm", "fbgemm", "ggml", "bitnet")


class Weights(Protocol):
    """Matrices of one shape, ready to be multiplied by: several, in different memory."""

    bytes: int  # of one matrix: codes, scales and zero points
    matrices_per_call: int  # that one of calls() multiplies by: more than one where a library runs graphs

    def calls(self, tokens: int) -> list[Callable[[], object]]:
        """Thunks that together go through all copies."""

    def warm(self, tokens: int) -> Callable[[], object]:
        """A thunk that multiplies by one matrix, always the same."""

    def error(self, tokens: int) -> float:
        """|y - y64| / |y64| (Frobenius): y64 in float64 from the same activations and the dequantized weights."""


@dataclass(frozen=True)
class Matmul:
    """One way of multiplying activations by a stored matrix."""

    name: str
    bits: float  # of a stored weight, scales apart
    quantizes_activations: bool  # to 8 bits, before multiplying
    weights: Callable[[int, int, int], Weights]  # (cols, rows, megabytes in all)
    ternary: bool = False  # weights -s, 0, s, whatever the bits they are stored in


class Table(Protocol):
    """An embedding table."""

    row_bytes: int  # that are read for one id

    def ids(self, count: int):
        """A set of `count` random ids in the form that gather takes."""

    def gather(self, ids) -> object:
        """The rows of `ids`, in a new output."""

    def output(self, count: int):
        """An output for gather_into, or None if the library offers no such thing."""

    def gather_into(self, ids, output) -> object:
        """The rows of `ids`, in the given output."""

    # A table of BAGS has ids() and these.

    def bags(self, count: int, bags: int):
        """A set of `count` random ids in `bags` bags of one size in the form that sum takes."""

    def sum(self, bags) -> object:
        """The sums of the bags' rows, in a new output."""


@dataclass(frozen=True)
class Gather:
    """One way of looking up rows of a table."""

    name: str
    bits: int
    output: str  # "f32" or "bf16"
    table: Callable[[int, int], Table]  # (rows, cols)


def copies_for(size: int, megabytes: int) -> int:
    """How many matrices of `size` bytes make `megabytes`, and at least two."""
    return max(2, -(-megabytes * 1_000_000 // size))
