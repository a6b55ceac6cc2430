"""`TernaryMatrix`: what every ternary file format is decoded to and encoded from, one trit a byte.

    W[n, k] = scales[n, k // group_size] * trits[n, k],   trits in {-1, 0, 1}

Nothing is rounded to trits here: `TernaryMatrix.from_float` takes only a matrix that is ternary already. A weight
becomes ternary once; twice would leave every trit and shrink the scale by the share of nonzeros.
"""

from dataclasses import dataclass

import torch

from ..matrix import PackedMatrix, as_tensor, matrix_shape


@dataclass(frozen=True, eq=False)
class TernaryMatrix:
    """A [rows, cols] ternary matrix, unpacked.

    Attributes:
        trits: int8 [rows, cols] in {-1, 0, 1}.
        scales: float32, positive and finite: [1, 1], [rows, 1] or [rows, ceil(cols / group_size)].
        group_size: columns that share a scale; -1 becomes cols.

    Raises TypeError or ValueError, naming trits or scales and the first element, for anything else. `==` is identity;
    use `equal`.
    """

    trits: torch.Tensor
    scales: torch.Tensor
    group_size: int = -1

    def __post_init__(self):
        rows, cols = matrix_shape(as_tensor(self.trits, "trits"), "trits")
        if self.trits.dtype != torch.int8:
            raise TypeError(f"trits: expected dtype torch.int8, got {self.trits.dtype}")
        refuse_where((self.trits > 1) | (self.trits < -1), self.trits, "trits: expected -1, 0 or 1")
        if self.group_size == -1:
            object.__setattr__(self, "group_size", cols)
        if type(self.group_size) is not int or not 1 <= self.group_size <= cols:
            raise ValueError(f"group_size: expected -1 or 1 to {cols}, got {self.group_size}")
        if self.scales.dtype != torch.float32:
            raise TypeError(f"scales: expected dtype torch.float32, got {self.scales.dtype}")
        groups = -(-cols // self.group_size)
        if list(self.scales.shape) not in ([rows, groups], [1, 1] if groups == 1 else None):
            allowed = f"[{rows}, {groups}]" + (" or [1, 1]" if groups == 1 else "")
            raise ValueError(f"scales: expected shape {allowed}, got {list(self.scales.shape)}")
        check_scales(self.scales)

    @classmethod
    def from_float(cls, weight: torch.Tensor) -> "TernaryMatrix":
        """The exact trits and the one scale of a float [rows, cols] whose nonzero elements share one magnitude.

        Raises ValueError for a matrix that is not ternary or not finite: it is not rounded here. All zeros: scale 1.
        """
        scale = magnitude(weight)
        if scale is None:
            raise ValueError("weight: expected nonzero elements of one magnitude (a ternary matrix), got several")
        return cls(weight.detach().sign().to(torch.int8), torch.full((1, 1), scale))

    @classmethod
    def from_packed(cls, packed: PackedMatrix) -> "TernaryMatrix":
        """The trits of a packed matrix in format "trit", or of "int2" with zero point 1 and codes up to 2.

        On the CPU, columns in original order. Raises ValueError where the matrix is not ternary.
        """
        if packed.perm is not None:
            raise ValueError("perm: expected a ternary matrix in its original column order, got a permutation")
        packed = packed.cpu()
        codes = packed.repack("trit").unpack_codes()
        return cls(codes.view(torch.int8) - 1, packed.scales.float(), packed.group_size)

    def to_packed(self) -> PackedMatrix:
        """The same matrix in format "trit". Scales become float16 where that is exact, else stay float32."""
        half = self.scales.to(torch.float16)
        scales = half if torch.equal(half.float(), self.scales) else self.scales
        codes = (self.trits + 1).view(torch.uint8)
        return PackedMatrix.from_codes(codes, scales, format="trit", group_size=self.group_size)

    def unpack(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Dense [rows, cols]: scale times trit, rounded once to `dtype`."""
        wide = self.scales.repeat_interleave(self.group_size, 1)[:, : self.trits.shape[1]]
        return (wide * self.trits).to(dtype)

    def equal(self, other: "TernaryMatrix") -> bool:
        """Whether trits, scales and group size are the same."""
        return (
            self.group_size == other.group_size
            and torch.equal(self.trits, other.trits)
            and torch.equal(self.scales, other.scales)
        )

    @property
    def shape(self) -> tuple[int, int]:
        return self.trits.shape[0], self.trits.shape[1]


def magnitude(weight: torch.Tensor) -> float | None:
    """The one absolute value of the nonzero elements of a float [rows, cols]; 1.0 without any, None for several.

    Raises ValueError for NaN and infinity, TypeError for anything but floats.
    """
    matrix_shape(as_tensor(weight, "weight"), "weight")
    if not weight.is_floating_point():
        raise TypeError(f"weight: expected a float dtype, got {weight.dtype}")
    weight = weight.detach()
    refuse_where(~weight.isfinite(), weight, "weight: expected finite numbers")
    sizes = weight.abs()
    largest = sizes.max()
    if largest == 0:
        return 1.0
    return largest.item() if bool(((sizes == 0) | (sizes == largest)).all()) else None


def check_scales(scales: torch.Tensor, name: str = "scales") -> None:
    """Raises ValueError, naming the first, unless every scale is positive and finite."""
    refuse_where(~(scales.isfinite() & (scales > 0)), scales, f"{name}: expected positive finite numbers")


def refuse_where(wrong: torch.Tensor, values: torch.Tensor, expected: str) -> None:
    """ValueError "<expected>, got <value> at <index>" for the first element of `values` where `wrong` is true."""
    if bool(wrong.any()):
        index = tuple(wrong.nonzero()[0].tolist())
        where = f" at {list(index)}" if index else ""
        raise ValueError(f"{expected}, got {values[index].item()}{where}")
