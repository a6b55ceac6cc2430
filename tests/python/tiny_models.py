"""Small random models of many architectures, built from their configurations: nothing is downloaded."""

from __future__ import annotations

import torch
import transformers

VOCABULARY = 160

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2, "head_dim": 16}
_NAMED = {k: _COMMON[k] for k in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}

# Class of the model, class of its configuration, what the configuration is made of.
ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _GROUPED),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_GROUPED, "tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_GROUPED, "sliding_window": 8}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", _GROUPED),
    # A sliding window on every other block: the blocks differ in their masks.
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**_GROUPED, "sliding_window": 8}),
    "phi": ("PhiForCausalLM", "PhiConfig", _COMMON),
    # Embeddings narrower than the blocks, with projections between.
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {k: v for k, v in _COMMON.items() if k != "intermediate_size"} | {"ffn_dim": 96, "word_embed_proj_dim": 32},
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {**_NAMED, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _COMMON),
    # Linear layers of a subclass; adds to their outputs in place.
    "falcon": (
        "FalconForCausalLM",
        "FalconConfig",
        {k: v for k, v in _COMMON.items() if k not in ("intermediate_size", "max_position_embeddings")},
    ),
    "bert": ("BertModel", "BertConfig", _COMMON),
    "bert_mlm": ("BertForMaskedLM", "BertConfig", _COMMON),
    # One block that runs twice.
    "albert": ("AlbertModel", "AlbertConfig", {**_COMMON, "embedding_size": 32}),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": VOCABULARY,
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 96,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
    ),
    # Experts fused into parameters of three dimensions.
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_GROUPED, "num_local_experts": 4}),
}


def build(architecture: str, dtype: torch.dtype = torch.float32, **changes) -> torch.nn.Module:
    """A model with the same random weights every time, in evaluation mode."""
    model, config, values = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    config = getattr(transformers, config)(**{**values, **changes})
    built = getattr(transformers, model)(config).to(dtype).eval()
    with torch.no_grad():  # far enough from zero that attention is not uniform
        for parameter in built.parameters():
            if parameter.ndim > 1 and parameter.std() < 0.06:
                parameter.mul_(0.06 / parameter.std())
    return built


def token_ids(windows: int = 24, length: int = 32) -> torch.Tensor:
    """Random ids [windows, length], the same every time."""
    return torch.randint(0, VOCABULARY, (windows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def outputs(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits, or the last hidden states of a model without a head, in float32."""
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **more)[0].float()


def relative_error(result: torch.Tensor, reference: torch.Tensor) -> float:
    return float((result - reference).norm() / reference.norm())
