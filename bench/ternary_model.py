"""A model trained with ternary weights, packed: what its perplexity and its bytes become.

    python bench/ternary_model.py           the table
    python bench/ternary_model.py --json    and a result file

Model: tests/data/tiny-ternary-code (Llama, 4 blocks, width 256; attention and MLP matrices trained with weight_quant in
the forward pass, latent weights stored in bf16; the head is tied to the embedding, and both stay floats). Its forward
pass at run time is that of lowbit.prepare_ternary_training; every row is compared with it: distance of logits, KL
divergence, perplexity. Measured as bench/quality.py does, on the standard-library modules that its training left out,
in windows of 256 tokens. "latent weights" is the model with weight_quant forgotten, "trit" and "int2" the packed one as
the two ways of holding it.

Bytes are those of model.safetensors; "ternary" is the share that the packed ternary matrices (codes and scales) take of
their bf16 bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
import sysconfig
import tempfile
from pathlib import Path

import harness
import torch
import transformers

import lowbit
from lowbit.checkpoint.native import packed_modules
from lowbit.cli.torch_options import load_model
from lowbit.evaluate import evaluate

MODEL = Path(__file__).parents[1] / "tests" / "data" / "tiny-ternary-code"
CONTEXT = 256
RECIPE = {
    "bits": "trit",
    "method": "rtn",
    "group_size": -1,
    "per_tensor": True,
    "head_bits": 16,
}  # lowbit ternarize --method absmean
DTYPES = (torch.float32, torch.bfloat16)


def dense(dtype: torch.dtype) -> torch.nn.Module:
    """The latent weights in a model of this dtype."""
    return transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype)


def pack(folder: Path) -> dict[str, float]:
    """Writes the packed model; its sizes."""
    model = dense(torch.bfloat16)
    report = lowbit.quantize(model, recipe=lowbit.Recipe(**RECIPE))
    lowbit.save(model, folder)
    weights = sum(rows * cols for rows, cols in (row["shape"] for row in report.modules))
    ternary = sum(matrix.nbytes for _, _, matrix in packed_modules(model))
    return {
        "file_bytes": (folder / "model.safetensors").stat().st_size,
        "ternary_weights": weights,
        "ternary_bytes": ternary,
        "ternary_ratio": ternary / (2 * weights),
    }


def packed(folder: Path, dtype: torch.dtype, form: str, activations: str) -> torch.nn.Module:
    model = load_model(folder, str(dtype).removeprefix("torch."), form)
    for _, module, _ in packed_modules(model):
        module.activations = activations
    return model


def twice(dtype: torch.dtype) -> bool:
    """Whether ternarizing the unpacked result again gives every matrix again."""
    first, second = dense(dtype), dense(dtype)
    lowbit.quantize(first, recipe=lowbit.Recipe(**RECIPE))
    with torch.no_grad():
        for name, _, matrix in packed_modules(first):
            second.get_submodule(name).weight = torch.nn.Parameter(matrix.unpack())
    lowbit.quantize(second, recipe=lowbit.Recipe(**RECIPE))
    again = {name: matrix for name, _, matrix in packed_modules(second)}
    return all(matrix.equal(again[name]) for name, _, matrix in packed_modules(first))


@torch.inference_mode()
def distance(model: torch.nn.Module, reference: torch.nn.Module, ids: torch.Tensor) -> float:
    """|logits - reference's| / |reference's| on one window."""
    ours, theirs = (each(ids[None, :CONTEXT]).logits.double() for each in (model, reference))
    return float((ours - theirs).norm() / theirs.norm())


def measure() -> list[dict]:
    library = Path(sysconfig.get_paths()["stdlib"])
    held_out = json.loads((MODEL / "training.json").read_text())["held_out_files"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    text = "".join((library / name).read_text("utf-8") for name in held_out)
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    rows = []
    stored = {"file_bytes": (MODEL / "model.safetensors").stat().st_size}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = pack(folder)
        for dtype in DTYPES:
            reference = dense(dtype)
            trained = lowbit.prepare_ternary_training(reference)
            subjects = {
                "weight_quant at run time": (reference, stored),
                "latent weights": (dense(dtype), stored),
                **{
                    f"{form}, {mode} activations": (packed(folder, dtype, form, mode), sizes)
                    for form, mode in (("trit", "float"), ("int2", "float"), ("trit", "int8"))
                },
            }
            for subject, (model, bytes_of) in subjects.items():
                result = evaluate(model, ids, reference=reference, context=CONTEXT)
                rows.append(
                    {
                        "subject": subject,
                        "dtype": str(dtype).removeprefix("torch."),
                        "matrices": len(trained),
                        "perplexity": result.perplexity,
                        "increase_percent": 100 * (result.perplexity / result.reference_perplexity - 1),
                        "kl_divergence": result.kl_divergence,
                        "top1_agreement": result.top1_agreement,
                        "logits_distance": distance(model, reference, ids),
                        **bytes_of,
                    }
                )
    return rows


def table(rows: list[dict]) -> str:
    widths = (28, 9, 11, 10, 10, 7, 9, 11, 7)

    def line(*cells: object) -> str:
        return "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))

    lines = [line("", "dtype", "perplexity", "increase", "KL", "top-1", "logits", "file bytes", "ternary")]
    for row in rows:
        figures = [f"{row['perplexity']:.4f}", f"{row['increase_percent']:+.4f}%", f"{row['kl_divergence']:.2e}"]
        figures += [f"{row['top1_agreement']:.4f}", f"{row['logits_distance']:.1e}", f"{row['file_bytes']:,}"]
        ratio = f"{row['ternary_ratio']:.4f}" if "ternary_ratio" in row else ""
        lines.append(line(row["subject"], row["dtype"], *figures, ratio))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", nargs="?", const="", help="write a result file, by default under bench/results")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    rows = measure()
    same = twice(torch.float32)
    print(table(rows))
    print(f"ternarized twice: {'the same matrices' if same else 'OTHER MATRICES'}")
    if arguments.json is not None:
        versions = {"python": sys.version.split()[0], "torch": torch.__version__}
        versions |= {"transformers": transformers.__version__, "lowbit": lowbit.__version__}
        settings = {"model": MODEL.name, "context": CONTEXT, "recipe": RECIPE, "twice_is_once": same}
        settings["threads"] = torch.get_num_threads()
        contents = harness.document("ternary_model", settings, versions, {}, rows, {})
        print(f"written: {harness.save(contents, arguments.json or None)}", file=sys.stderr)


if __name__ == "__main__":
    main()
