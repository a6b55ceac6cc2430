"""PyTorch: dense linears (the baseline), its own int4 and int8 weight-only products, and its embeddings."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from peers import Gather, Matmul, copies_for
from peers.dense import CopiedWeights, total_bytes

GROUP = 128


def available() -> dict:
    return {"torch": torch.__version__}


# ---- matmul ----


def _dense(dtype: torch.dtype, prepacked: bool, cols: int, rows: int, megabytes: int) -> CopiedWeights:
    """prepacked: reordered once for oneDNN, which F.linear does again at every call."""
    w = (torch.randn(rows, cols) * 0.02).to(dtype)
    size = total_bytes(w)
    make: Callable = torch.ops.mkldnn._reorder_linear_weight if prepacked else torch.clone
    multiply = F.linear
    if prepacked:

        def multiply(x, packed):
            return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")

    return CopiedWeights([make(w) for _ in range(copies_for(size, megabytes))], multiply, size, cols, dtype, lambda: w)


def _int4pack(cols: int, rows: int, megabytes: int) -> CopiedWeights:
    codes = torch.randint(0, 16, (rows, cols), dtype=torch.int32)
    scales = torch.rand(rows, cols // GROUP) * 0.002 + 0.001
    offsets = torch.randn(rows, cols // GROUP) * 0.002
    grid = torch.stack([scales, offsets], -1).transpose(0, 1).contiguous().bfloat16()  # [K/128, N, 2]
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
    size = total_bytes(packed, grid)

    def dense() -> torch.Tensor:
        scale, offset = grid.transpose(0, 1).float().unsqueeze(2).unbind(-1)
        return ((codes.float().view(rows, -1, GROUP) - 8) * scale + offset).view(rows, cols)

    def multiply(x, copy):
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, copy[0], GROUP, copy[1])

    copies = [(packed.clone(), grid.clone()) for _ in range(copies_for(size, megabytes))]
    return CopiedWeights(copies, multiply, size, cols, torch.bfloat16, dense)


def _int8pack(cols: int, rows: int, megabytes: int) -> CopiedWeights:
    codes = torch.randint(-128, 128, (rows, cols), dtype=torch.int8)
    scales = (torch.rand(rows) * 0.001 + 0.0005).bfloat16()
    size = total_bytes(codes, scales)

    def multiply(x, copy):
        return torch.ops.aten._weight_int8pack_mm(x, copy[0], copy[1])

    copies = [(codes.clone(), scales.clone()) for _ in range(copies_for(size, megabytes))]
    return CopiedWeights(copies, multiply, size, cols, torch.bfloat16, lambda: codes.float() * scales.float()[:, None])


MATMUL = [
    Matmul("torch f32", 32, False, partial(_dense, torch.float32, False)),
    Matmul("torch bf16", 16, False, partial(_dense, torch.bfloat16, False)),
    Matmul("torch bf16 prepacked", 16, False, partial(_dense, torch.bfloat16, True)),
    Matmul("torch int4pack g128", 4, False, _int4pack),
    Matmul("torch int8pack", 8, False, _int8pack),
]


# ---- gather ----


def _random_table(rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of random numbers, the same thousand again and again: half a billion of them would take seconds."""
    block = torch.empty(min(rows, 1000), cols).uniform_(-0.02, 0.02).to(dtype)
    table = torch.empty(rows, cols, dtype=dtype)
    for part in table.split(1000):
        part.copy_(block[: len(part)])
    return table


class _Dense:
    def __init__(self, dtype: torch.dtype, rows: int, cols: int):
        self.table = _random_table(rows, cols, dtype)
        self.row_bytes = cols * self.table.element_size()

    def ids(self, count: int) -> torch.Tensor:
        return torch.randint(0, len(self.table), (count,))

    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.table)

    def output(self, count: int) -> torch.Tensor:
        return self.table.new_empty(count, self.table.shape[1])

    def gather_into(self, ids: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        return torch.index_select(self.table, 0, ids, out=output)

    def bags(self, count: int, bags: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.ids(count), torch.arange(0, count, count // bags)

    def sum(self, bags: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        ids, offsets = bags
        return F.embedding_bag(ids, self.table, offsets, mode="sum")


class _Quantized:
    """torch.ops.quantized.embedding_byte and embedding_4bit: a scale and an offset at the end of each row."""

    def __init__(self, bits: int, rows: int, cols: int):
        dtype = torch.quint8 if bits == 8 else torch.quint4x2
        w = _random_table(rows, cols, torch.float32)
        scales, zeros = torch.full((rows,), 0.04 / (2**bits - 1)), torch.full((rows,), 2.0 ** (bits - 1))
        quantized = torch.quantize_per_channel(w, scales, zeros, 0, dtype)
        self.packed = torch.ops.quantized.embedding_bag_prepack(quantized)
        self.lookup = torch.ops.quantized.embedding_byte if bits == 8 else torch.ops.quantized.embedding_4bit
        self.add = torch.ops.quantized.embedding_bag_byte if bits == 8 else torch.ops.quantized.embedding_bag_4bit
        self.rows, self.row_bytes = rows, cols * bits // 8 + (8 if bits == 8 else 4)

    def ids(self, count: int) -> torch.Tensor:
        return torch.randint(0, self.rows, (count,))

    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lookup(self.packed, ids)

    def bags(self, count: int, bags: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.ids(count), torch.arange(0, count, count // bags)

    def sum(self, bags: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return self.add(self.packed, *bags, mode=0)

    def output(self, count: int) -> None:
        return None


GATHER = [
    Gather("torch f32", 32, "f32", partial(_Dense, torch.float32)),
    Gather("torch bf16", 16, "bf16", partial(_Dense, torch.bfloat16)),
    Gather("torch quantized byte", 8, "f32", partial(_Quantized, 8)),
    Gather("torch quantized 4-bit", 4, "f32", partial(_Quantized, 4)),
]
BAGS = [
    Gather("torch f32", 32, "f32", partial(_Dense, torch.float32)),
    Gather("torch quantized byte", 8, "f32", partial(_Quantized, 8)),
    Gather("torch quantized 4-bit", 4, "f32", partial(_Quantized, 4)),
]
