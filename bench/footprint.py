"""Bytes of packed models on disk and in memory, against the arithmetic. python bench/footprint.py [--help]

4 bits for everything, groups of 128, fp16 scales, the tied table once (bench/folders.py writes them with random
weights). Three things are measured, each in a process of its own:

    loaded      files, weights, and how much of the process is resident once every weight has been read (one forward
                pass of one token), less what the process took before, a small model run already
    swaps       then 100 times: the head unloaded, another put in (packed, float, from a file), a token; the slowest of
                them in seconds, and what memory they kept
    on demand   the model opened with lowbit.load(on_demand=True); then one layer run
    too large   a model larger than the machine's memory (a file of holes: codes and scales 0), opened on demand, a
                layer run, and another

The arithmetic is 4 bits a weight, 16 bits a scale and a norm or bias.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import harness

MODELS = ("Llama-3.2-1B", "Qwen2.5-0.5B")
TOO_LARGE = "Llama-2-70B"


def arithmetic(config: object) -> int:
    """Bytes of the tensors if nothing were padded."""
    import torch
    from folders import meta_model

    from lowbit import models

    model = meta_model(config, "")
    total = sum(2 * p.numel() for p in model.parameters() if p.ndim < 2)
    seen = set()
    for name, module in model.named_modules():
        if models.has_matrix(module) and not (config.tie_word_embeddings and module is model.get_output_embeddings()):
            rows, cols = module.weight.shape
            total += rows * cols // 2 + rows * -(-cols // 128) * 2
            seen.add(name)
    assert isinstance(model, torch.nn.Module) and seen
    return total


def child(kind: str, folder: str) -> dict:
    """Memory of this process, in MiB, before and after the steps of one measurement."""
    import folders
    import torch
    import transformers
    from model import memory

    import lowbit
    from lowbit.evaluate import model_bytes

    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as small:  # what loading and running import is not the model's memory
        config = transformers.AutoConfig.from_pretrained(folder)
        change = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": 256}
        folders.write_packed(Path(small), type(config)(**change, num_attention_heads=4, num_key_value_heads=2))
        lowbit.load(small)(input_ids=torch.tensor([[1]]), use_cache=False)
    steps = {"before": memory()}
    if kind == "loaded":
        model = lowbit.load(folder)
        with torch.inference_mode():
            model(input_ids=torch.tensor([[1]]), use_cache=False)
        steps["one token"] = memory()
        table, head = model.get_input_embeddings().packed, model.get_output_embeddings().packed
        one = table.codes.data_ptr() == head.codes.data_ptr()
        return {"steps": steps, "weights": model_bytes(model), "one_table": one, "swaps": swaps(model)}
    model = lowbit.load(folder, on_demand=True)
    steps["opened"] = memory()
    layers = model.model.layers
    bytes_of = [sum(m.packed.nbytes for m in layer.modules() if getattr(m, "packed", None)) for layer in layers[:2]]
    states = torch.ones(1, 1, model.config.hidden_size, dtype=model.dtype)
    positions = model.model.rotary_emb(states, torch.zeros(1, 1, dtype=torch.long))
    for index in (0, len(layers) // 2):
        with torch.inference_mode():
            layers[index](states, position_embeddings=positions)
        steps[f"layer {index}"] = memory()
    return {"steps": steps, "layer_bytes": bytes_of[0]}


def swaps(model: object, count: int = 100) -> dict:
    """Heads that come and go, from memory and from a file, a token each."""
    import time

    import torch
    from model import memory

    import lowbit

    packed = model.lm_head.unload()
    dense = packed.unpack(torch.bfloat16)
    x, times = torch.zeros(1, 1, packed.cols, dtype=torch.bfloat16), []
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        path = Path(scratch) / "head.safetensors"
        lowbit.save_weight(dense, path)
        weights, before = (packed, dense, path), None
        for swap in range(len(weights) + count):
            if swap == len(weights):  # each has been in once
                before = memory()["resident_mb"]
            start = time.perf_counter()
            model.lm_head.load(weights[swap % len(weights)])
            model.lm_head(x)
            model.lm_head.unload()
            times.append(time.perf_counter() - start)
        kept = memory()["resident_mb"] - before
    model.lm_head.load(packed)
    return {
        "count": count,
        "slowest_seconds": max(times),
        "median_seconds": sorted(times)[len(times) // 2],
        "kept_mb": kept,
    }


def measure(kind: str, folder: Path) -> dict:
    command = [sys.executable, __file__, "--child", kind, str(folder)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--too-large", default=TOO_LARGE, help="'' leaves it out")
    parser.add_argument("--output", type=Path, help="results file; default in bench/results")
    parser.add_argument("--child", nargs=2, metavar=("KIND", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(*options.child)))
        return
    import folders
    import torch

    import lowbit

    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in filter(None, [*options.models, options.too_large]):
            config, folder, large = folders.SHAPES[name], Path(scratch) / name, name == options.too_large
            size = folders.write_packed(folder, config, holes=large)
            file = (folder / "model.safetensors").stat().st_size
            row = {"model": name, "arithmetic_bytes": arithmetic(config), "tensor_bytes": size, "file_bytes": file}
            kinds = ("on demand",) if large else ("loaded", "on demand")
            row |= {kind: measure(kind, folder) for kind in kinds}
            rows.append(row)
            print(line(row), flush=True)
            shutil.rmtree(folder)
    settings = {"threads": torch.get_num_threads()}
    document = harness.document("footprint", settings, {"lowbit": lowbit.__version__}, {}, rows, {})
    print(harness.save(document, options.output))


def line(row: dict) -> str:
    text = f"{row['model']:<14} arithmetic {row['arithmetic_bytes']:,} file {row['file_bytes']:,}"
    for kind in ("loaded", "on demand"):
        if kind in row:
            before, *after = row[kind]["steps"].values()
            names = list(row[kind]["steps"])[1:]
            grown = (
                f"{n} +{s['resident_mb'] - before['resident_mb']:.0f} MiB" for n, s in zip(names, after, strict=True)
            )
            text += f" | {kind}: {', '.join(grown)}"
    return text


if __name__ == "__main__":
    main()
