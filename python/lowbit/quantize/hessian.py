"""What the solver knows of a layer's inputs: H = mean of x xᵀ over calibration tokens."""

from __future__ import annotations

import torch
from torch import Tensor

TOKENS_AT_A_TIME = 4096  # converted to float32
_COLS = 512  # columns of one block of the upper triangle


class Hessian:
    """The second moment of a layer's inputs, H[i, j] = mean over tokens of x[i] * x[j], accumulated in float32.

    It is the Hessian, up to a factor of two, of the layer's squared output error with respect to a row of its weights
    (Frantar et al. 2022), the same for every row. Layers that read the same input share one.

    Attributes:
        cols: in_features K.
        tokens: tokens seen so far.
        matrix: float32 [K, K], symmetric; zeros before the first token.
    """

    def __init__(self, cols: int, device: torch.device | str = "cpu"):
        if cols < 1:
            raise ValueError(f"cols: expected at least 1, got {cols}")
        self.cols = cols
        self.tokens = 0
        self._sum = torch.zeros(cols, cols, device=device)  # the upper triangle of blocks; the rest stays zero

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Adds inputs x [..., K] of any floating dtype. Products of two float16 or bfloat16 numbers are exact in
        float32. Raises ValueError when the last dimension is not K or the dtype is not floating."""
        if x.ndim < 1 or x.shape[-1] != self.cols:
            raise ValueError(f"x: expected shape [..., {self.cols}], got {list(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"x: expected a floating dtype, got {x.dtype}")
        x = x.detach().reshape(-1, self.cols)
        for part in x.split(TOKENS_AT_A_TIME):
            part = part.to(self._sum.device, torch.float32)
            # H is symmetric: only blocks on and right of the diagonal are computed.
            for i in range(0, self.cols, _COLS):
                rows = self._sum[i : i + _COLS, i:]
                torch.addmm(rows, part[:, i : i + _COLS].T, part[:, i:], out=rows)
        self.tokens += len(x)

    @property
    def matrix(self) -> Tensor:
        upper = self._sum.triu()
        full = upper + upper.triu(1).T
        return full / max(self.tokens, 1)
