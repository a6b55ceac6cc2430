"""FBGEMM: its inference embedding tables (row-wise int8 and int4), one id a bag of one, unpooled."""

from __future__ import annotations

import importlib.metadata
from functools import partial

import fbgemm_gpu  # noqa: F401  registers torch.ops.fbgemm
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen

from peers import Gather


def available() -> dict:
    return {"fbgemm-gpu-cpu": importlib.metadata.version("fbgemm-gpu-cpu")}


class _Rowwise:
    def __init__(self, weights: SparseType, output: SparseType, rows: int, cols: int):
        self.module = IntNBitTableBatchedEmbeddingBagsCodegen(
            [("table", rows, cols, weights, EmbeddingLocation.HOST)],
            pooling_mode=PoolingMode.NONE,
            output_dtype=output,
            device="cpu",
        )
        self.module.initialize_weights()
        codes, scales = self.module.split_embedding_weights()[0]
        codes.random_(0, 100)
        self.rows = rows
        self.row_bytes = codes.shape[1] + (scales.shape[1] if scales is not None else 4)

    def ids(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randint(0, self.rows, (count,), dtype=torch.int32), torch.arange(count + 1, dtype=torch.int32)

    def gather(self, ids: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return self.module(*ids)

    def output(self, count: int) -> None:
        return None


MATMUL: list = []
GATHER = [
    Gather("fbgemm int8 -> f32", 8, "f32", partial(_Rowwise, SparseType.INT8, SparseType.FP32)),
    Gather("fbgemm int8 -> bf16", 8, "bf16", partial(_Rowwise, SparseType.INT8, SparseType.BF16)),
    Gather("fbgemm int4 -> f32", 4, "f32", partial(_Rowwise, SparseType.INT4, SparseType.FP32)),
    Gather("fbgemm int4 -> bf16", 4, "bf16", partial(_Rowwise, SparseType.INT4, SparseType.BF16)),
]
