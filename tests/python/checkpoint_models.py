"""Tiny random models for the checkpoint tests, and ways to pack them."""

import hashlib
from pathlib import Path

import torch
import transformers

import lowbit
from lowbit import models


def llama(tie=True, dtype=torch.float32, vocab_size=256, **changes):
    return build(
        transformers.LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=vocab_size,
            max_position_embeddings=128,
            tie_word_embeddings=tie,
            **changes,
        ),
        dtype,
    )


def gemma3():
    return build(
        transformers.Gemma3TextConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            vocab_size=257,
            max_position_embeddings=128,
        ),
        torch.bfloat16,
    )


def build(config, dtype=torch.float32):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():  # norms and biases start as ones and zeros, which would hide a mix-up
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def linears(model):
    """{name: float weight [rows, cols]} of the linear layers inside the blocks, Conv1D too."""
    return {
        name: models.weight_matrix(module)
        for name, module in model.named_modules()
        if models.has_matrix(module) and not isinstance(module, torch.nn.Embedding) and name != "lm_head"
    }


def pack(model, format="int4", group_size=32, table=None, activations="float", **options):
    """Packs every linear layer, and the token embedding with its tied head to `table`; returns the model."""
    matrices = {
        name: lowbit.PackedMatrix.from_float(weight.contiguous(), format, group_size, **options)
        for name, weight in linears(model).items()
    }
    if table is not None:
        embedding = model.get_input_embeddings()
        shared = lowbit.PackedMatrix.from_float(embedding.weight.detach(), table)
        for name, module in model.named_modules():
            if module is embedding or (module is model.get_output_embeddings() and model.config.tie_word_embeddings):
                matrices[name] = shared
    models.patch(model, matrices, activations=activations)
    return model


def act_order(rows, cols, format, group_size, symmetric, seed=0):
    """A random matrix with a column permutation."""
    generator = torch.Generator().manual_seed(seed)
    bits = lowbit.PackedMatrix.from_float(torch.zeros(1, 16), format).bits
    groups = -(-cols // group_size)
    return lowbit.PackedMatrix.from_codes(
        torch.randint(0, 1 << bits, (rows, cols), generator=generator, dtype=torch.uint8),
        torch.rand(rows, groups, generator=generator).add(0.01).to(torch.float16),
        None if symmetric else torch.randint(0, 1 << bits, (rows, groups), generator=generator, dtype=torch.uint8),
        torch.randperm(cols, generator=generator, dtype=torch.int32),
        format=format,
        group_size=group_size,
    )


def logits(model, length=11):
    ids = torch.arange(length)[None] * 7 % model.config.vocab_size
    with torch.no_grad():
        return model(ids).logits


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(folder).iterdir())}
