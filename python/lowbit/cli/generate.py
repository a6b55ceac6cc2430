"""`lowbit generate`: continues a prompt."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer

from lowbit.cli.terminal import (
    DebugOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    Terminal,
    TernaryOption,
    ThreadsOption,
)


def generate(
    model: Annotated[str, typer.Argument(help="Folder of the model.", metavar="MODEL")],
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from stdin.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the random numbers, when temperature is above 0.")] = 0,
    dtype: DtypeOption = "auto",
    ternary: TernaryOption = "auto",
    device: DeviceOption = "cpu",
    threads: ThreadsOption = 0,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Continue a prompt.

    Text goes to stdout as it comes, figures to stderr.
    """
    import torch

    from lowbit.cli import torch_options

    folder = torch_options.model_folder(model)
    torch_options.set_threads(threads)
    tokenizer = torch_options.load_tokenizer(folder)
    loaded = torch_options.load_model(folder, dtype, ternary, device)
    prompt = sys.stdin.read() if prompt == "-" else prompt
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if not ids.numel():
        raise ValueError("prompt: expected at least one token, got an empty text")

    stream = _Stream(tokenizer, write=(lambda text: None) if json else _write)
    if not json:
        _write(prompt)
    torch.manual_seed(seed)
    # Sampling is spelled out: a model's generation_config may set top_k and others of its own.
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        if temperature
        else {"do_sample": False}
    )
    end = loaded.generation_config.eos_token_id
    loaded.generate(
        ids.to(loaded.device),
        attention_mask=torch.ones_like(ids, device=loaded.device),
        max_new_tokens=max_new_tokens,
        pad_token_id=end[0] if isinstance(end, list) else end,
        streamer=stream,
        **sampling,
    )
    figures = stream.figures()
    if json:
        Terminal(json).emit(
            {
                "model": model,
                "prompt": prompt,
                "text": stream.text,
                "temperature": temperature,
                "seed": seed,
                **figures,
            }
        )
        return
    _write("\n")
    decode = figures["decode_tokens_per_second"]
    Terminal(json=True).line(
        "speed",
        f"prompt: {figures['prompt_tokens']} tokens at {figures['prefill_tokens_per_second']:.0f} tokens/s · "
        f"text: {figures['new_tokens']} tokens" + (f" at {decode:.1f} tokens/s" if decode else ""),
    )


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


class _Stream:
    """What transformers' generate calls: put(prompt ids), put(token) for each new one, end().

    Prefill is the time from the prompt to the first token, decode the time from there to the last one.
    """

    def __init__(self, tokenizer: Any, write: Any) -> None:
        self.text = ""
        self._tokenizer, self._write = tokenizer, write
        self._prompt_tokens, self._ids, self._times = 0, [], []

    def put(self, value: Any) -> None:
        self._times.append(time.perf_counter())
        if not self._prompt_tokens:
            self._prompt_tokens = value.numel()
            return
        self._ids += value.flatten().tolist()
        text = self._decode()
        # A character of several tokens is not there before its last one.
        if not text.endswith("\ufffd"):
            self._show(text)

    def end(self) -> None:
        self._show(self._decode())

    def figures(self) -> dict[str, Any]:
        start, first, *rest = self._times
        return {
            "prompt_tokens": self._prompt_tokens,
            "new_tokens": len(self._ids),
            "prefill_tokens_per_second": self._prompt_tokens / (first - start),
            "decode_tokens_per_second": len(rest) / (rest[-1] - first) if rest else None,
        }

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _show(self, text: str) -> None:
        self._write(text[len(self.text) :])
        self.text = text
