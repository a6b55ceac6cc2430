"""bitsandbytes: NF4 with blocks of 128, its fused CPU product (gemv_4bit) on its CPU layout, bf16 activations."""

from __future__ import annotations

import importlib.metadata

import bitsandbytes  # noqa: F401  registers torch.ops.bitsandbytes
import bitsandbytes.functional as BF
import torch

from peers import Matmul, copies_for
from peers.dense import CopiedWeights, total_bytes

BLOCK = 128


def available() -> dict:
    return {"bitsandbytes": importlib.metadata.version("bitsandbytes")}


def _nf4(cols: int, rows: int, megabytes: int) -> CopiedWeights:
    codes, state = BF.quantize_4bit(torch.randn(rows, cols) * 0.02, blocksize=BLOCK, quant_type="nf4")
    dense = BF.dequantize_4bit(codes, state).float()
    packed, packed_state = BF._convert_weight_packed_for_cpu(codes.clone(), state)
    size = total_bytes(packed, packed_state.absmax)

    def multiply(x, copy):
        return torch.ops.bitsandbytes.gemv_4bit.default(x, copy[0], [rows, cols], copy[1], packed_state.code, BLOCK)

    copies = [(packed.clone(), packed_state.absmax.clone()) for _ in range(copies_for(size, megabytes))]
    return CopiedWeights(copies, multiply, size, cols, torch.bfloat16, lambda: dense)


MATMUL = [Matmul("bitsandbytes NF4 b128", 4, False, _nf4)]
GATHER: list = []
