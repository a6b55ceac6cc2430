"""What quantizing the table that head and embedding share costs, and which way of doing it costs least.

    python bench/tied_quality.py        every width, rounded and solved with several dampings

Model, texts and windows: those of bench/quality.py. Everything but the table stays in bf16, so a row is the table's own
damage, in both of its uses. "solver d": GPTQ with the inputs of the head, d times the mean of the Hessian's diagonal
added to it (Recipe.tied_damp): the larger, the nearer the rows stay to what they were as embeddings.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import harness
import torch
import transformers
from quality import CONTEXT, MODEL, calibration, held_out_ids

import lowbit
from lowbit.evaluate import evaluate

SIZES = ((8, 128), (4, 128), (4, 32), (3, 128), (2, 64))  # bits, group size
VARIANTS = {
    "round to nearest": {"method": "rtn", "clip": False},
    "rounded and clipped": {"method": "rtn", "clip": True},
    **{f"solver {damp:g}": {"tied_damp": damp} for damp in (0.01, 0.1, 0.3, 1.0)},
}


def measure(folder: Path) -> list[dict]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = held_out_ids(folder, tokenizer)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder)
    rows = []
    for bits, group_size in SIZES:
        for variant, change in VARIANTS.items():
            model = transformers.AutoModelForCausalLM.from_pretrained(folder)
            recipe = lowbit.Recipe(**{"bits": 16, "embed_bits": bits, "group_size": group_size, **change})
            report = lowbit.quantize(model, calibration(0), recipe, tokenizer=tokenizer, context=CONTEXT)
            result = evaluate(model, ids, reference=reference, context=CONTEXT)
            [row] = report.modules
            rows.append(
                {
                    "bits": bits,
                    "group_size": group_size,
                    "variant": variant,
                    "default": change.get("tied_damp") == lowbit.Recipe().tied_damp,
                    "bits_per_weight": row["bits_per_weight"],
                    "perplexity": result.perplexity,
                    "reference_perplexity": result.reference_perplexity,
                    "increase_percent": 100 * (result.perplexity / result.reference_perplexity - 1),
                    "kl_divergence": result.kl_divergence,
                    "top1_agreement": result.top1_agreement,
                }
            )
            figures = f"{rows[-1]['increase_percent']:+.3f}% KL {result.kl_divergence:.5f}"
            print(f"{bits} bits, groups of {group_size}, {variant}: {figures}", file=sys.stderr)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, help="results file; default in bench/results")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    rows = measure(MODEL)
    settings = {
        "threads": torch.get_num_threads(),
        "model": MODEL.name,
        "context": CONTEXT,
        "recipe": lowbit.Recipe().to_dict(),
    }
    versions = {"lowbit": lowbit.__version__, "transformers": transformers.__version__}
    print(harness.save(harness.document("tied_quality", settings, versions, {}, rows, {}), options.json))
    print(json.dumps({"best": best(rows)}, indent=1))


def best(rows: list[dict]) -> dict[str, str]:
    """The variant of least KL divergence for each size."""
    sizes = {(row["bits"], row["group_size"]): [] for row in rows}
    for row in rows:
        sizes[row["bits"], row["group_size"]].append(row)
    return {f"{b} g{g}": min(those, key=lambda row: row["kl_divergence"])["variant"] for (b, g), those in sizes.items()}


if __name__ == "__main__":
    main()
