"""The byte layouts in which others keep ternary matrices: docs/formats.md section 4.

`BLOCKS` holds the formats whose rows are made of blocks with a scale each (GGUF's TQ1_0 and TQ2_0, PTQ1_0), and IQ1_BN
with one scale a row; `encode` and `decode` go between their bytes and a TernaryMatrix. I2_S and Hugging Face's BitNet
packing have no blocks, and functions of their own. Every byte is checked: what no writer of a format makes is refused.

Five digits d0..d4 in {0, 1, 2} (trit + 1) share a byte: b = (256 * q + 242) // 243 with
q = 81 d0 + 27 d1 + 9 d2 + 3 d3 + d4. That is ceil(256 q / 243), the fraction q / 243 in 8 bits and rounded up:
multiplying by 3 carries the leading digit out of the byte and leaves the fraction of the rest. So digit p is
(3 * r) >> 8 with r = b * 3**p mod 256.

Scales lie in the files little endian and are read as they lie.
"""

from dataclasses import dataclass

import torch

from .ternary_matrix import TernaryMatrix, check_scales, refuse_where

I2_S_LAYOUTS = ("x86",)
_I2_S_BLOCK = 128
_I2_S_TAIL = 32  # the fp32 scale, and what aligns it

_POWERS = torch.tensor([1, 3, 9, 27, 81], dtype=torch.uint8)
_PLACES = torch.tensor([81, 27, 9, 3, 1], dtype=torch.int32)
_Q = torch.arange(243)


def _bytes_of(q: torch.Tensor) -> torch.Tensor:
    return ((256 * q + 242) // 243).to(torch.uint8)


def _mask(values: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros(256, dtype=torch.bool)
    mask[values.long()] = True
    return mask


# Which bytes a writer makes: of five digits; of four whose place for a fifth (the last, the first) is 0.
_FIVE = _mask(_bytes_of(_Q))
_FOUR_LEADING = _mask(_bytes_of(_Q[_Q % 3 == 0]))
_FOUR_TRAILING = _mask(_bytes_of(_Q[_Q < 81]))


@dataclass(frozen=True)
class BlockFormat:
    """A row is `prefix` bytes (an fp16 scale of the row, or none), then blocks of `nbytes` bytes for `size` weights.

    stages: (bytes, digits a byte) of a block in order; in a stage of c bytes, digit n of byte m is weight n * c + m
    after those of the stages before it. Empty for formats that are laid out otherwise.
    """

    name: str
    size: int
    nbytes: int
    prefix: int = 0
    stages: tuple[tuple[int, int], ...] = ()

    def row_bytes(self, cols: int) -> int:
        """Bytes of a row of `cols` weights. Raises ValueError unless cols is a multiple of the block."""
        if cols < 1 or cols % self.size:
            raise ValueError(f"cols: expected a multiple of {self.size} for {self.name}, got {cols}")
        return self.prefix + cols // self.size * self.nbytes


BLOCKS = {
    block.name: block
    for block in (
        BlockFormat("TQ1_0", 256, 54, stages=((32, 5), (16, 5), (4, 4))),
        BlockFormat("TQ2_0", 256, 66),
        BlockFormat("PTQ1_0", 128, 28, stages=((16, 5), (8, 5), (2, 4))),
        BlockFormat("IQ1_BN", 64, 13, prefix=2),
    )
}
WRITABLE = ("TQ1_0", "TQ2_0")


def decode(format: str, data: torch.Tensor, cols: int, *, canonicalise: bool = False) -> TernaryMatrix:
    """The matrix in `data`, uint8 [rows, row_bytes], of format TQ1_0, TQ2_0, PTQ1_0 or IQ1_BN.

    One scale for the matrix where all blocks agree, one a row where those of each row do, else one a block. Blocks
    without a scale (d = 0) hold zeros and have no say; a matrix of zeros gets the scale 1.
    canonicalise: take bytes that no writer makes (the 13 beside the 243, and a filled place of an absent digit) for
        what they decode to, as other readers do, instead of refusing them.

    Raises TypeError or ValueError naming what is wrong: another dtype or length, such a byte, a 2-bit code 3, a scale
    that is not positive and finite, a scale of 0 over weights that are not zero.
    """
    block = _block(format)
    _require_bytes(data, 2)
    rows, expected = data.shape[0], block.row_bytes(cols)
    if data.shape[1] != expected or rows < 1:
        raise ValueError(f"data: expected [rows, {expected}] bytes for {cols} columns, got {list(data.shape)}")
    if format == "IQ1_BN":
        return _decode_iq1_bn(data, cols, canonicalise)
    blocks = data.reshape(rows, cols // block.size, block.nbytes)
    payload, scales = blocks[..., :-2], _halves(blocks[..., -2:])
    if block.stages:
        trits = _decode_stages(payload, block, canonicalise)
    else:
        trits = _two_bits(payload.unflatten(-1, (2, 1, 32)), torch.tensor([0, 2, 4, 6]).view(4, 1)).flatten(-3)
    return _with_common_scale(trits, scales)


def encode(format: str, matrix: TernaryMatrix) -> torch.Tensor:
    """The rows of a matrix as TQ1_0 or TQ2_0, uint8 [rows, row_bytes]: the bytes that the gguf package writes for it.

    Scales are rounded to fp16; a block of zeros gets the scale 0. Raises ValueError for columns or a group size that
    are no multiple of the block, and for a scale that fp16 cannot hold.
    """
    if format not in WRITABLE:
        raise ValueError(f"format: expected one of {', '.join(WRITABLE)}, got {format!r}")
    block = _block(format)
    rows, cols = matrix.shape
    block.row_bytes(cols)
    digits = (matrix.trits + 1).view(torch.uint8).reshape(rows, cols // block.size, block.size)
    scales = _block_scales(matrix, block.size)
    if block.stages:
        payload = _encode_stages(digits, block)
    else:
        planes = digits.unflatten(-1, (2, 4, 32))
        payload = (planes << torch.tensor([0, 2, 4, 6], dtype=torch.uint8).view(4, 1)).sum(-2, dtype=torch.uint8)
        payload = payload.flatten(-2)
    return torch.cat([payload, scales.unsqueeze(-1).view(torch.uint8)], -1).reshape(rows, -1)


def decode_i2_s(data: torch.Tensor, rows: int, cols: int, layout: str | None) -> TernaryMatrix:
    """The matrix in an I2_S tensor of bitnet.cpp: uint8 [rows * cols / 4 + 32], one fp32 scale after the codes.

    layout: builds for x86, ARM and others order the codes differently under one type id and one length, and any order
        reads as a valid matrix. So nothing can be concluded from the bytes: "x86" says who wrote them, and None is
        refused.

    Raises ValueError for a missing layout, another length, a code 3, a scale that is not positive and finite.
    """
    if layout is None:
        raise ValueError(
            "I2_S: layout: expected to be told (builds of bitnet.cpp order the codes differently and the file does not "
            f"say how): one of {', '.join(I2_S_LAYOUTS)}, got None"
        )
    if layout not in I2_S_LAYOUTS:
        raise ValueError(f"I2_S: layout: expected one of {', '.join(I2_S_LAYOUTS)}, got {layout!r}")
    _require_bytes(data, 1)
    count = rows * cols
    if rows < 1 or cols < 1 or count % _I2_S_BLOCK:
        raise ValueError(f"shape: expected a multiple of {_I2_S_BLOCK} weights for I2_S, got {rows}x{cols}")
    if data.numel() != count // 4 + _I2_S_TAIL:
        raise ValueError(f"data: expected {count // 4 + _I2_S_TAIL} bytes for {rows}x{cols}, got {data.numel()}")
    codes = data[: count // 4].reshape(-1, 1, 32)
    trits = _two_bits(codes, torch.tensor([6, 4, 2, 0]).view(4, 1)).reshape(rows, cols)
    scale = data[count // 4 : count // 4 + 4].clone().view(torch.float32).reshape(1, 1)
    return TernaryMatrix(trits, scale)


def pack_rows(trits: torch.Tensor) -> torch.Tensor:
    """Hugging Face's BitNet packing: trits int8 [rows, cols] -> uint8 [rows / 4, cols].

    Bits 2j of byte [i, c] are trits[i + j * rows / 4, c] + 1. Raises ValueError unless rows is a multiple of 4.
    """
    if trits.shape[0] % 4:
        raise ValueError(f"rows: expected a multiple of 4 (out_features) for BitNet packing, got {trits.shape[0]}")
    quarters = (trits + 1).view(torch.uint8).unflatten(0, (4, -1))
    return (quarters << torch.tensor([0, 2, 4, 6], dtype=torch.uint8).view(4, 1, 1)).sum(0, dtype=torch.uint8)


def unpack_rows(packed: torch.Tensor) -> torch.Tensor:
    """trits int8 [4 * n, cols] of Hugging Face's BitNet packing, uint8 [n, cols]. Raises ValueError for a code 3."""
    _require_bytes(packed, 2)
    return _two_bits(packed.unsqueeze(0), torch.tensor([0, 2, 4, 6]).view(4, 1, 1)).flatten(0, 1)


# ---- digits ----


def _decode_stages(payload: torch.Tensor, block: BlockFormat, canonicalise: bool) -> torch.Tensor:
    """payload uint8 [rows, blocks, bytes] -> trits int8 [rows, blocks, size]."""
    parts, begin = [], 0
    for width, digits in block.stages:
        stage = payload[..., begin : begin + width]
        _check_bytes(stage, _FIVE if digits == 5 else _FOUR_LEADING, begin, canonicalise)
        parts.append(_trits(stage)[..., :digits].mT.flatten(-2))
        begin += width
    return torch.cat(parts, -1)


def _encode_stages(digits: torch.Tensor, block: BlockFormat) -> torch.Tensor:
    parts, begin = [], 0
    for width, count in block.stages:
        planes = digits[..., begin : begin + count * width].unflatten(-1, (count, width))
        parts.append(_bytes_of((planes * _PLACES[:count].view(count, 1)).sum(-2)))
        begin += count * width
    return torch.cat(parts, -1)


def _decode_iq1_bn(data: torch.Tensor, cols: int, canonicalise: bool) -> TernaryMatrix:
    """Sixteen weights are three bytes of five and one digit of the block's last byte; the first digit is the least."""
    blocks = data[:, 2:].reshape(data.shape[0], cols // 64, 13)
    threes, extra = blocks[..., :12], blocks[..., 12:]
    _check_bytes(threes, _FIVE, 0, canonicalise)
    _check_bytes(extra, _FOUR_TRAILING, 12, canonicalise)
    fifteens = _trits(threes).flip(-1).unflatten(-2, (4, 3)).flatten(-2)
    lasts = _trits(extra).flip(-1)[..., :4].mT
    trits = torch.cat([fifteens, lasts], -1).reshape(data.shape[0], 1, cols)
    scales = _halves(data[:, :2].unsqueeze(1))
    # Its writer compares with half of the row's maximum, so a row of zeros is full of +1, times 0.
    return _with_common_scale(trits.masked_fill((scales == 0).unsqueeze(-1), 0), scales)


def _trits(data: torch.Tensor) -> torch.Tensor:
    """uint8 [...] -> int8 [..., 5], the most significant digit first."""
    rest = data.unsqueeze(-1) * _POWERS  # modulo 256
    return (rest > 85).to(torch.int8) + (rest > 170) - 1  # (3 * rest) >> 8, less 1


def _two_bits(data: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
    codes = data >> shifts.to(torch.uint8) & 3
    refuse_where(codes == 3, codes, "codes: expected 0, 1 or 2")
    return codes.view(torch.int8) - 1


def _check_bytes(data: torch.Tensor, allowed: torch.Tensor, begin: int, canonicalise: bool) -> None:
    if canonicalise:
        return
    wrong = ~allowed[data.int()]
    if bool(wrong.any()):
        row, block, place = wrong.nonzero()[0].tolist()
        value = int(data[row, block, place])
        raise ValueError(
            f"data: expected a byte that five ternary digits give, got {value} at row {row}, block {block}, "
            f"byte {begin + place} (canonicalise takes it for the digits that it decodes to)"
        )


# ---- scales ----


def _halves(data: torch.Tensor) -> torch.Tensor:
    """uint8 [..., 2] -> float32 [...]."""
    copied = data.clone(memory_format=torch.contiguous_format)  # aligned, whatever the data is
    return copied.view(torch.float16).squeeze(-1).float()


def _with_common_scale(trits: torch.Tensor, scales: torch.Tensor) -> TernaryMatrix:
    """trits [rows, blocks, size] and their scales [rows, blocks], as few scales as say the same."""
    absent = scales == 0
    check_scales(scales.masked_fill(absent, 1), "block scales")
    refuse_where(absent & trits.any(-1), scales, "block scales: expected a positive scale of weights that are not zero")
    rows, blocks, size = trits.shape
    low, high = scales.masked_fill(absent, torch.inf).amin(1), scales.amax(1)
    low_all, high_all = low.min(), high.max()
    if high_all == 0:
        scales = torch.ones(1, 1)
    elif low_all == high_all:
        scales = high_all.reshape(1, 1)
    elif bool((low >= high).all()):  # above it where the row has no scale
        scales = high.masked_fill(high == 0, 1).unsqueeze(1)
    else:
        return TernaryMatrix(trits.reshape(rows, blocks * size), scales.masked_fill(absent, 1), size)
    return TernaryMatrix(trits.reshape(rows, blocks * size), scales)


def _block_scales(matrix: TernaryMatrix, size: int) -> torch.Tensor:
    """fp16 [rows, blocks]: the scale of each block, 0 where all its weights are."""
    rows, cols = matrix.shape
    if matrix.group_size != cols and matrix.group_size % size:
        raise ValueError(f"group_size: expected a multiple of {size} or {cols} (a row), got {matrix.group_size}")
    groups = torch.arange(0, cols, size) // matrix.group_size
    scales = matrix.scales[:, groups].expand(rows, -1)
    half = scales.to(torch.float16)
    refuse_where(~(half.isfinite() & (half > 0)), scales, "scales: expected a number that fp16 holds")
    return half.masked_fill(~matrix.trits.reshape(rows, -1, size).any(-1), 0)


def _block(format: str) -> BlockFormat:
    if format not in BLOCKS:
        raise ValueError(f"format: expected one of {', '.join(BLOCKS)}, got {format!r}")
    return BLOCKS[format]


def _require_bytes(data: torch.Tensor, dimensions: int) -> None:
    if data.dtype != torch.uint8:
        raise TypeError(f"data: expected dtype torch.uint8, got {data.dtype}")
    if data.ndim != dimensions:
        raise ValueError(f"data: expected {dimensions} dimensions, got {list(data.shape)}")
