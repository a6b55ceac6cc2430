"""What the torch-based subjects share: rotation over copies, activations, and the error against float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch


def relative_error(y: torch.Tensor, x: torch.Tensor, dense: torch.Tensor) -> float:
    """|y - x.dense^T| / |x.dense^T| in float64; y [M, N], x [M, K], dense [N, K]."""
    reference = x.double() @ dense.double().T
    return float((y.double() - reference).norm() / reference.norm())


class CopiedWeights:
    """Copies of one matrix in different memory; multiply(x, copy) -> [tokens, rows]."""

    matrices_per_call = 1

    def __init__(
        self,
        copies: list,
        multiply: Callable,
        size: int,
        cols: int,
        dtype: torch.dtype,
        dense: Callable[[], torch.Tensor],
    ):
        """size: bytes of one. dtype: of the activations. dense() -> the dequantized first copy, [rows, cols]."""
        self.copies, self.multiply, self.bytes = copies, multiply, size
        self.cols, self.dtype, self.dense = cols, dtype, dense

    def _activations(self, tokens: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(tokens)
        return torch.randn(tokens, self.cols, generator=generator).to(self.dtype)

    def calls(self, tokens: int) -> list[Callable]:
        x = self._activations(tokens)
        return [partial(self.multiply, x, copy) for copy in self.copies]

    def warm(self, tokens: int) -> Callable:
        return partial(self.multiply, self._activations(tokens), self.copies[0])

    def error(self, tokens: int) -> float:
        x = self._activations(tokens)
        return relative_error(self.multiply(x, self.copies[0]), x, self.dense())


def total_bytes(*tensors: torch.Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
