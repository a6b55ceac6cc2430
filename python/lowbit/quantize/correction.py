"""The least-squares correction: weights for the inputs that a layer will have, not for those it used to have.

Once the layers before it are quantized, a layer reads x̃ where it used to read x. Of all weights, those that give
nearest to W x on x̃ are W G H⁻¹ with H = mean x̃x̃ᵀ and G = mean x x̃ᵀ; quantizing them instead of W lets every layer
make up for what those before it have lost (what Qronos amounts to, Zhang et al. 2025, arXiv 2505.11695).

Written with the drift D = G - H it is W + W D (H + λI)⁻¹: inputs that have not moved leave the weights exactly as they
are, and the small difference is summed rather than lost between two large sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.quantize.hessian import TOKENS_AT_A_TIME

# With fewer tokens the fit is to them and not to the text they come from.
LEAST_TOKENS = 4096
# λ, a share of the largest eigenvalue of H: enough to invert what float32 sums can tell apart, and no more. The solver
# damps H by itself and much more.
_DAMP = 1e-6
_MAX_DAMP = 1.0


class Drift:
    """How a layer's inputs have moved: D[i, j] = mean over tokens of (x[i] - x̃[i]) * x̃[j], accumulated in float32.

    Attributes:
        cols: in_features K.
        tokens: tokens seen so far.
        matrix: float32 [K, K], not symmetric; zeros before the first token.
    """

    def __init__(self, cols: int, device: torch.device | str = "cpu"):
        if cols < 1:
            raise ValueError(f"cols: expected at least 1, got {cols}")
        self.cols = cols
        self.tokens = 0
        self._sum = torch.zeros(cols, cols, device=device)

    @torch.no_grad()
    def add(self, original: Tensor, quantized: Tensor) -> None:
        """Adds the inputs of the same tokens in the original and in the quantized network, both [..., K] and of any
        floating dtype. Raises ValueError for shapes that differ or do not end in K, and other dtypes."""
        if original.shape != quantized.shape or quantized.ndim < 1 or quantized.shape[-1] != self.cols:
            raise ValueError(
                f"inputs: expected two of shape [..., {self.cols}], got {list(original.shape)} and "
                f"{list(quantized.shape)}"
            )
        for x in (original, quantized):
            if not x.is_floating_point():
                raise ValueError(f"inputs: expected a floating dtype, got {x.dtype}")
        original, quantized = (x.detach().reshape(-1, self.cols) for x in (original, quantized))
        for before, now in zip(original.split(TOKENS_AT_A_TIME), quantized.split(TOKENS_AT_A_TIME), strict=True):
            before, now = (x.to(self._sum.device, torch.float32) for x in (before, now))
            torch.addmm(self._sum, (before - now).T, now, out=self._sum)
        self.tokens += len(quantized)

    @property
    def matrix(self) -> Tensor:
        return self._sum / max(self.tokens, 1)


class LeastSquares:
    """The correction for all layers that read one input; factored once.

    hessian, drift: float32 [K, K], means over the same tokens. `lower` is the Cholesky factor of H + λI, float64, or
    None when there is none: H is zero, or something is not finite.
    """

    def __init__(self, hessian: Tensor, drift: Tensor):
        if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1] or hessian.shape != drift.shape:
            raise ValueError(
                f"hessian, drift: expected two of shape [K, K], got {list(hessian.shape)} and {list(drift.shape)}"
            )
        self.drift = drift.double()
        self.lower = _factor(hessian.double()) if bool(drift.isfinite().all()) else None

    def __call__(self, weight: Tensor) -> Tensor:
        """The corrected weight [N, K], float32. Raises ValueError for another K or without a factor."""
        if self.lower is None:
            raise ValueError("hessian, drift: expected finite numbers that are not all zero")
        if weight.ndim != 2 or weight.shape[1] != len(self.drift):
            raise ValueError(f"weight: expected shape [N, {len(self.drift)}], got {list(weight.shape)}")
        weight = weight.detach().to(self.drift.device, torch.float64)
        change = torch.cholesky_solve((weight @ self.drift).T, self.lower).T
        return (weight + change).float()


def _factor(hessian: Tensor) -> Tensor | None:
    largest = largest_eigenvalue(hessian)
    if not 0 < largest < float("inf"):
        return None
    damp = _DAMP
    while damp <= _MAX_DAMP:
        damped = hessian.clone()
        damped.diagonal().add_(damp * largest)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed.item() == 0:
            return lower
        damp *= 10
    return None


def largest_eigenvalue(hessian: Tensor, steps: int = 20) -> float:
    """Of a symmetric matrix [K, K] without negative eigenvalues, by power iteration: some percent low at worst, which
    is nothing to a share of it. NaN when the matrix is not finite."""
    vector = hessian.sum(1) + hessian.diagonal()  # not orthogonal to the first eigenvector but by accident
    norm = vector.norm()
    for _ in range(steps):
        if not norm > 0:
            break
        vector = hessian @ (vector / norm)
        norm = vector.norm()
    return float(norm)
