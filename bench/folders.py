"""Folders of packed models with random weights, or none: for measuring files and memory without a float model.

The tensors are those that lowbit.quantize would leave behind, by shape and dtype: all linear layers, the token
embedding and the head in one format, norms and biases in bfloat16, a tied table once.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers

from lowbit import _C, models
from lowbit.abi import FORMATS, normalise_group_size
from lowbit.checkpoint import native
from lowbit.checkpoint.safetensors_map import SafetensorsFile, serialize
from lowbit.integrations.transformers import meta_model

_BLOCK = 1 << 24  # bytes of random numbers made at a time

SHAPES = {  # what distinguishes a published model's configuration
    "Llama-3.2-1B": transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
    ),
    "Qwen2.5-0.5B": transformers.Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "Llama-2-70B": transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    ),
}


def write_packed(
    folder: Path,
    config: transformers.PreTrainedConfig,
    format: str = "int4",
    group_size: int = 128,
    holes: bool = False,
) -> int:
    """Writes a packed model of a configuration and returns the bytes of its tensors. holes: every code and scale is 0
    and the file takes no room on a disk that knows holes; else they are random."""
    config.architectures = [transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]
    config.dtype = torch.bfloat16
    tensors, entries = _tensors(meta_model(config, str(folder)), format, group_size)
    described = native.quantization_config(entries)
    folder.mkdir(parents=True, exist_ok=True)
    values = {**json.loads(config.to_json_string()), "quantization_config": described}
    (folder / "config.json").write_text(json.dumps(values))
    path = folder / "model.safetensors"
    header = bytes(next(iter(serialize(tensors, native.file_metadata(described, set(tensors)))())))
    size = sum(tensor.nbytes for tensor in tensors.values())
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(len(header) + size)
    if not holes:
        _fill(path)
    return size


def _tensors(model: torch.nn.Module, format: str, group_size: int) -> tuple[dict, dict]:
    """On the meta device: every tensor of the file; and the entries of the packed modules."""
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in model.named_parameters()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied, owner = model.config.tie_word_embeddings, None
    entries = {}
    for name, module in model.named_modules():
        if not models.has_matrix(module):
            continue
        rows, cols = module.weight.shape
        kind = "embedding" if models.is_table(module) else "linear"
        group = normalise_group_size(group_size if group_size < cols else -1, cols)
        shared = owner if tied and module is head else None
        entries[name] = native.ModuleEntry(format, cols, group, kind=kind, shared_with=shared)
        owner = name if module is embedding else owner
        tensors.pop(f"{name}.weight", None)
        if shared is None:
            lines = _C.row_lines(FORMATS[format], cols)
            tensors[f"{name}.weight"] = torch.empty(rows, lines, 64, dtype=torch.uint8, device="meta")
            scales = torch.empty(rows, -(-cols // group), dtype=torch.float16, device="meta")
            tensors[f"{name}.weight_scale"] = scales
    return tensors, entries


def _fill(path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    with open(path, "r+b") as file:
        for entry in SafetensorsFile(path).entries.values():
            file.seek(entry.begin)
            count = (entry.end - entry.begin) // entry.dtype.itemsize
            for begin in range(0, count, _BLOCK):
                some = min(_BLOCK, count - begin)
                if entry.dtype == torch.uint8:
                    values = torch.randint(256, (some,), dtype=torch.uint8, generator=generator)
                else:
                    values = torch.rand(some, generator=generator).mul_(0.01).to(entry.dtype)
                file.write(memoryview(values.view(torch.uint8).numpy()))
