"""A model's shape in llama.cpp: a GGUF file of random blocks, timed by its own llama-bench.

Built by `cmake -S llama.cpp -B build -DGGML_NATIVE=ON -DLLAMA_CURL=OFF; cmake --build build --target llama-bench`;
found by LLAMA_BENCH=/path/to/llama-bench. llama-bench loads the file, warms up and times; a question is a run of it.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
from pathlib import Path

PROGRAM = os.environ.get("LLAMA_BENCH", "")
# How llama.cpp users hold such models: the type of the blocks' matrices, and of the embedding and the head.
KINDS = {
    "llama-1b": {"llama.cpp Q4_0": ("Q4_0", "Q8_0", "Q8_0")},
    "ternary-2.7b": {"llama.cpp TQ1_0": ("TQ1_0", "Q4_0", "TQ1_0"), "llama.cpp TQ2_0": ("TQ2_0", "Q4_0", "TQ2_0")},
}
_SCALES = {
    "Q4_0": (0, 18),
    "Q8_0": (0, 34),
    "TQ1_0": (52, 54),
    "TQ2_0": (64, 66),
}  # place of a block's fp16 scale, bytes


class LlamaCpp:
    """The worker's side: one file and the questions about it."""

    def __init__(self, threads: int):
        self.threads, self.version, self.loaded = threads, "", {}

    def describe(self) -> dict:
        """Nothing yet: llama-bench tells its commit with its figures. LookupError: there is none."""
        if not PROGRAM or not os.access(PROGRAM, os.X_OK):
            raise LookupError("LLAMA_BENCH names no llama-bench")
        return {}

    def make(self, folder: str, shape: dict, kind: str, name: str) -> dict:
        """Writes the file of one of KINDS[kind] and has it run once; its bytes, and those that a token reads."""
        self.path = str(Path(folder, name.replace(" ", "_") + ".gguf"))
        size, embedding = write_gguf(self.path, shape, *KINDS[kind][name])
        self._rate(["-p", "0", "-n", "1"])
        table = 0 if shape["tie_word_embeddings"] else embedding  # read as a head
        self.loaded = {"disk_bytes": size, "token_bytes": size - table, "load_seconds": None}
        return {**self.loaded, "version": self.version}

    def decode(self, tokens: int, **_) -> list[float]:
        """Seconds a token."""
        return [1 / self._rate(["-p", "0", "-n", str(tokens)])]

    def prefill(self, prompt: int, **_) -> list[float]:
        """Seconds of one pass over `prompt` tokens."""
        return [prompt / self._rate(["-p", str(prompt), "-n", "0"])]

    def memory(self) -> dict:
        """Of llama-bench, the peak of its runs so far: the file is mapped, so its pages are in it."""
        return {"resident_mb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024, 1)}

    def _rate(self, what: list[str]) -> float:
        """Tokens a second."""
        command = [PROGRAM, "-m", self.path, "-t", str(self.threads), "-r", "1", "-o", "json", *what]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr else f"status {done.returncode}")
        figures = json.loads(done.stdout)[0]
        self.version = f"{figures['build_number']} ({figures['build_commit']})"
        return figures["avg_ts"]


def write_gguf(path: str, shape: dict, blocks: str, embedding: str, head: str) -> tuple[int, int]:
    """A Llama of that shape with random codes: the same work as a trained one. The bytes of the file and, of these, of
    the embedding."""
    import gguf
    import numpy

    random = numpy.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(shape["num_hidden_layers"])
    writer.add_context_length(shape["max_position_embeddings"])
    writer.add_embedding_length(shape["hidden_size"])
    writer.add_feed_forward_length(shape["intermediate_size"])
    writer.add_head_count(shape["num_attention_heads"])
    writer.add_head_count_kv(shape["num_key_value_heads"])
    writer.add_key_length(shape["head_dim"])
    writer.add_value_length(shape["head_dim"])
    writer.add_rope_dimension_count(shape["head_dim"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape["vocab_size"])
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, rows: int, cols: int, kind: str) -> None:
        at, size = _SCALES[kind]
        per_block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        data = random.integers(0, 256, (rows, cols // per_block, size), dtype=numpy.uint8)
        data[..., at : at + 2] = numpy.frombuffer(numpy.float16(0.02 / cols**0.5).tobytes(), dtype=numpy.uint8)
        writer.add_tensor(name, data.reshape(rows, -1), raw_dtype=gguf.GGMLQuantizationType[kind])

    def norm(name: str) -> None:
        writer.add_tensor(name, numpy.ones(shape["hidden_size"], dtype=numpy.float32))

    width, inner = shape["hidden_size"], shape["intermediate_size"]
    queries, keys = shape["num_attention_heads"] * shape["head_dim"], shape["num_key_value_heads"] * shape["head_dim"]
    add("token_embd.weight", shape["vocab_size"], width, embedding)
    if not shape["tie_word_embeddings"]:
        add("output.weight", shape["vocab_size"], width, head)
    norm("output_norm.weight")
    for layer in range(shape["num_hidden_layers"]):
        for part, rows, cols in (
            ("attn_q", queries, width),
            ("attn_k", keys, width),
            ("attn_v", keys, width),
            ("attn_output", width, queries),
            ("ffn_gate", inner, width),
            ("ffn_up", inner, width),
            ("ffn_down", width, inner),
        ):
            add(f"blk.{layer}.{part}.weight", rows, cols, blocks)
        norm(f"blk.{layer}.attn_norm.weight")
        norm(f"blk.{layer}.ffn_norm.weight")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    per_block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[embedding]]
    return Path(path).stat().st_size, shape["vocab_size"] * width // per_block * size
