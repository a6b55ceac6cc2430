"""What ternary weights do to a model trained dense: attention alone, the MLP alone, both, and every projection alone.

    python bench/ternary_quality.py             every way to ternarize, calibrated on one text
    python bench/ternary_quality.py --texts 3   and on two more: how much of a difference is chance

Model, texts and windows are those of quality.py (tests/data/tiny-llama-code; its head, tied to the embedding, stays in
bf16), so the figures of both stand beside each other. The ways:

    absmean            one scale a matrix, mean|w|, as ternary models are trained: the baseline
    absmean, fitted    the same trits, the scale of each matrix then fitted to its weights by least squares
    rounded            to nearest, a scale of each group searched
    solver             GPTQ with the grid {-s, 0, s} of each group
    solver, corrected  the same behind the least-squares correction
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

import harness
import quality
import torch
import transformers

import lowbit
from lowbit.evaluate import evaluate

PARTS = {"attention": ["self_attn"], "MLP": ["mlp"], "both": ["self_attn", "mlp"]}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GROUP_SIZES = (64, 128, 256)
ABSMEAN = {"method": "rtn", "per_tensor": True, "group_size": -1}
FITTED = {"method": "exact", "group_size": -1}
WAYS = {
    "rounded": {"method": "rtn", "clip": True},
    "solver": {"correction": "none"},
    "solver, corrected": {"correction": "least_squares"},
}
FIGURES = ("perplexity", "kl_divergence", "top1_agreement")


def cases() -> Iterator[tuple[str, list[str], str, dict]]:
    """(what is ternarized, names of its modules, way, fields of the recipe)."""
    for part, names in PARTS.items():
        yield part, names, "absmean", ABSMEAN
        yield part, names, "absmean, fitted", FITTED
        for group_size in GROUP_SIZES:
            for way, change in WAYS.items():
                yield part, names, way, {**change, "group_size": group_size}
    for name in PROJECTIONS:
        yield name, [name], "absmean", ABSMEAN
        yield name, [name], "solver, corrected", {**WAYS["solver, corrected"], "group_size": 128}


@torch.no_grad()
def fit_scales(model: torch.nn.Module, names: list[str]) -> None:
    """Makes the linear layers below modules of these names ternary: the trits of absmean, the scale that is nearest."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and set(names) & set(name.split(".")):
            weight = module.weight.float()
            trits = (weight / weight.abs().mean()).round().clamp(-1, 1)
            module.weight.copy_(trits * ((weight * trits).sum() / trits.abs().sum()))


def measure(folder: Path, texts: int, ways: list[str] | None = None) -> list[dict]:
    """One row a case, figures being means over the texts; each is printed to standard error when it is known."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = quality.held_out_ids(folder, tokenizer)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder)
    rows = []
    for part, names, way, change in cases():
        if ways and way not in ways:
            continue
        results, bits, seconds = [], [], []
        for number in range(1 if "method" in change else texts):
            model = transformers.AutoModelForCausalLM.from_pretrained(folder)
            if change is FITTED:
                fit_scales(model, names)
            recipe = lowbit.Recipe(bits=16, rules=[f"{name}=trit" for name in names], **change)
            text = quality.calibration(number)
            report = lowbit.quantize(model, text, recipe, tokenizer=tokenizer, context=quality.CONTEXT)
            results.append(evaluate(model, ids, reference=reference, context=quality.CONTEXT))
            bits.append(quality.bits_per_weight(report))
            seconds.append(report.seconds)
        rows.append(
            {
                "ternary": part,
                "way": way,
                "group_size": change["group_size"],
                "texts": len(results),
                "bits_per_weight": bits[0],
                "reference_perplexity": results[0].reference_perplexity,
                **{name: mean(getattr(result, name) for result in results) for name in FIGURES},
                "kl_divergences": [result.kl_divergence for result in results],
                "perplexities": [result.perplexity for result in results],
                "seconds": mean(seconds),
            }
        )
        print(line(rows[-1]), file=sys.stderr, flush=True)
    return rows


def line(row: dict) -> str:
    group = "matrix" if row["group_size"] == -1 else f"g{row['group_size']}"
    figures = f"{row['perplexity']:>10.2f}  {row['kl_divergence']:>8.4f}  {row['top1_agreement']:>6.3f}"
    return f"{row['ternary']:<9}  {row['way']:<17}  {group:>6}  {row['bits_per_weight']:>11.3f}  {figures}"


def table(rows: list[dict]) -> str:
    header = (
        f"{'ternary':<9}  {'way':<17}  {'scales':>6}  {'bits/weight':>11}  {'perplexity':>10}  {'KL':>8}  {'top-1':>6}"
    )
    return "\n".join([f"perplexity {rows[0]['reference_perplexity']:.3f} before", header, *map(line, rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=1, help="calibrate on so many texts, one after the other")
    parser.add_argument("--ways", nargs="*", metavar="WAY", help="only these")
    parser.add_argument("--json", nargs="?", const="", help="write a result file, by default under bench/results")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    rows = measure(quality.MODEL, arguments.texts, arguments.ways)
    print(table(rows))
    if arguments.json is not None:
        versions = {"python": sys.version.split()[0], "torch": torch.__version__}
        versions |= {"transformers": transformers.__version__, "lowbit": lowbit.__version__}
        settings = {"model": quality.MODEL.name, "context": quality.CONTEXT, "texts": arguments.texts}
        settings["threads"] = torch.get_num_threads()
        contents = harness.document("ternary_quality", settings, versions, {}, rows, {})
        print(f"written: {harness.save(contents, arguments.json or None)}", file=sys.stderr)


if __name__ == "__main__":
    main()
