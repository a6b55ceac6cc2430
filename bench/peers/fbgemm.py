"""FBGEMM: its inference embedding tables (row-wise int8 and int4): one id a bag of one, unpooled; and bags."""

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
    def __init__(self, pooling: PoolingMode, weights: SparseType, output: SparseType, rows: int, cols: int):
        self.module = IntNBitTableBatchedEmbeddingBagsCodegen(
            [("table", rows, cols, weights, EmbeddingLocation.HOST)],
            pooling_mode=pooling,
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

    def bags(self, count: int, bags: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.ids(count)[0], torch.arange(0, count + 1, count // bags, dtype=torch.int32)

    sum = gather  # pooled, where the table was made so

    def output(self, count: int) -> None:
        return None


_lookup, _pooled = (partial(_Rowwise, pooling) for pooling in (PoolingMode.NONE, PoolingMode.SUM))

MATMUL: list = []
GATHER = [
    Gather("fbgemm int8 -> f32", 8, "f32", partial(_lookup, SparseType.INT8, SparseType.FP32)),
    Gather("fbgemm int8 -> bf16", 8, "bf16", partial(_lookup, SparseType.INT8, SparseType.BF16)),
    Gather("fbgemm int4 -> f32", 4, "f32", partial(_lookup, SparseType.INT4, SparseType.FP32)),
    Gather("fbgemm int4 -> bf16", 4, "bf16", partial(_lookup, SparseType.INT4, SparseType.BF16)),
]
BAGS = [
    Gather("fbgemm int8", 8, "f32", partial(_pooled, SparseType.INT8, SparseType.FP32)),
    Gather("fbgemm int4", 4, "f32", partial(_pooled, SparseType.INT4, SparseType.FP32)),
]
