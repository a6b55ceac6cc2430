"""The shapes that every matmul benchmark uses: (in_features, out_features) of linears in current language models."""

from __future__ import annotations

SHAPES = {
    "A": (4096, 4096),  # attention projections of 7-8B models
    "B": (4096, 11008),  # Llama-2-7B gate and up
    "C": (11008, 4096),  # Llama-2-7B down
    "D": (2048, 32000),  # a head with a small vocabulary
}
TOKENS = (1, 4, 16, 128, 512)
# A shape other than A is measured for these only, unless --all-tokens asks for TOKENS.
FEW_TOKENS = (1, 16)
TABLE = (128256, 4096)  # rows and columns of the embedding: Llama-3-8B
IDS = (1, 64, 4096)
BAG_TABLES = (TABLE, (1_000_000, 128))  # the second: a table of a recommender
BAG_IDS, BAGS = 4096, (64, 512)  # ids in all, in so many bags of one size
