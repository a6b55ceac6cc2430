"""What quantizing costs in quality: perplexity and KL divergence of a small real model before and after.

    python bench/quality.py             the defaults of Recipe beside rounding and solving without correction
    python bench/quality.py --sweep     and each option of the solver changed alone
    python bench/quality.py --texts 3   and calibrated on two more texts: how much of a difference is chance

Model: tests/data/tiny-llama-code (Llama, 4 blocks, width 256, bf16; the head is tied to the embedding, and both stay
in bf16). Measured on the standard-library modules that its training left out (training.json), joined in that order, in
windows of 256 tokens; calibrated on 70,000 characters of other modules (lowbit.sample_text), in windows of 256; the
other texts are the characters that follow in those. Nothing is drawn at random, so the same libraries on the same
interpreter give the same figures.
"""

from __future__ import annotations

import argparse
import json
import sys
import sysconfig
from pathlib import Path

import harness
import torch
import transformers

import lowbit
from lowbit.evaluate import evaluate
from lowbit.sample_text import calibration_text

CHARACTERS = 70_000
MODEL = Path(__file__).parents[1] / "tests" / "data" / "tiny-llama-code"
CONTEXT = 256
SIZES = ((8, 32), (4, 128), (3, 128), (2, 64))  # bits, group size
VARIANTS = {
    "round to nearest": {"method": "rtn", "clip": False},
    "rounded and clipped": {"method": "rtn", "clip": True},
    "uncorrected": {"correction": "none"},
    "defaults": {},
}
# Rise of perplexity in percent at the same sizes, on the same model, texts and windows, by bits: not measured by this
# program, and not on the machine that it runs on.
ELSEWHERE = {"GPTQModel 7.7, measured on another machine": {"8": 0.0, "4": 0.28, "3": 3.2, "2": 21.0}}
# One change to the defaults each; a value that is the default is left out.
CHANGES = {
    "order": ("none", "act", "gar"),
    "symmetric": (True, False),
    "clip": (False, True),
    "damp": (0.01, 0.03, 0.1),
    "correction": ("least_squares",),
    "grids": ("updated", "static"),
    "true_sequential": (True, False),
    "scale_dtype": ("float16", "bfloat16", "float32"),
}


def variants(sweep: bool) -> dict[str, dict]:
    if not sweep:
        return VARIANTS
    defaults = lowbit.Recipe().to_dict()
    changes = {
        f"{name}={value}": {name: value}
        for name, values in CHANGES.items()
        for value in values
        if value != defaults[name]
    }
    return {**VARIANTS, **changes}


def calibration(number: int) -> list[str]:
    """The default calibration text (number 0), or as many characters of the same modules that follow number - 1."""
    before = calibration_text(number * CHARACTERS)
    return [text[len(head) :] for text, head in zip(calibration_text((number + 1) * CHARACTERS), before, strict=True)]


def held_out_ids(folder: Path, tokenizer: object) -> torch.Tensor:
    """The text that the model's training left out, as ids [T]."""
    library = Path(sysconfig.get_paths()["stdlib"])
    held_out = json.loads((folder / "training.json").read_text())["held_out_files"]
    text = "".join((library / name).read_text("utf-8") for name in held_out)
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"])


def bits_per_weight(report: lowbit.quantize.Report) -> float:
    """Of the quantized matrices, with scales and padding."""
    weights = sum(row["shape"][0] * row["shape"][1] for row in report.modules)
    return sum(row["bits_per_weight"] * row["shape"][0] * row["shape"][1] for row in report.modules) / weights


def measure(folder: Path, chosen: dict[str, dict], sizes: list[tuple[int, int]], texts: int = 1) -> list[dict]:
    """One row a size, variant and calibration text; each is printed to standard error when it is known."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = held_out_ids(folder, tokenizer)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder)

    rows = []
    for bits, group_size in sizes:
        for variant, change, number in expand(chosen, texts):
            model = transformers.AutoModelForCausalLM.from_pretrained(folder)
            recipe = lowbit.Recipe(bits=bits, group_size=group_size, head_bits=16, embed_bits=16, **change)
            report = lowbit.quantize(model, calibration(number), recipe, tokenizer=tokenizer, context=CONTEXT)
            result = evaluate(model, ids, reference=reference, context=CONTEXT)
            rows.append(
                {
                    "bits": bits,
                    "group_size": group_size,
                    "variant": variant,
                    "bits_per_weight": bits_per_weight(report),
                    "perplexity": result.perplexity,
                    "reference_perplexity": result.reference_perplexity,
                    "increase_percent": 100 * (result.perplexity / result.reference_perplexity - 1),
                    "kl_divergence": result.kl_divergence,
                    "top1_agreement": result.top1_agreement,
                    "fallbacks": sum(row["fallback"] is not None for row in report.modules),
                    "seconds": report.seconds,
                }
            )
            print(
                f"{bits} bits, groups of {group_size}, {variant}: {rows[-1]['increase_percent']:+.3f}%", file=sys.stderr
            )
    return rows


def expand(chosen: dict[str, dict], texts: int) -> list[tuple[str, dict, int]]:
    """(name, change, number of the calibration text); rounding needs no text, so it is measured once."""
    return [
        (f"{name}, text {number + 1}" if number else name, change, number)
        for name, change in chosen.items()
        for number in range(1 if change.get("method") == "rtn" else texts)
    ]


def table(rows: list[dict]) -> str:
    widths = (4, 5, 31, 11, 10, 9, 8, 6)

    def line(*cells: object) -> str:
        return "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))

    header = ("bits", "group", "variant", "bits/weight", "perplexity", "increase", "KL", "top-1")
    lines = [f"perplexity {rows[0]['reference_perplexity']:.3f} before", line(*header)]
    for row in rows:
        figures = [f"{row['bits_per_weight']:.3f}", f"{row['perplexity']:.3f}", f"{row['increase_percent']:.2f}%"]
        figures += [f"{row['kl_divergence']:.5f}", f"{row['top1_agreement']:.3f}"]
        lines.append(line(row["bits"], row["group_size"], row["variant"], *figures))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", action="store_true", help="every option of the solver changed alone, too")
    parser.add_argument("--texts", type=int, default=1, help="calibrate on so many texts, one after the other")
    parser.add_argument("--bits", type=int, nargs="*", help="only these widths")
    parser.add_argument("--json", nargs="?", const="", help="write a result file, by default under bench/results")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    sizes = [size for size in SIZES if not arguments.bits or size[0] in arguments.bits]
    rows = measure(MODEL, variants(arguments.sweep), sizes, arguments.texts)
    print(table(rows))
    if arguments.json is not None:
        versions = {"python": sys.version.split()[0], "torch": torch.__version__}
        versions |= {"transformers": transformers.__version__, "lowbit": lowbit.__version__}
        settings = {
            "model": MODEL.name,
            "context": CONTEXT,
            "recipe": lowbit.Recipe().to_dict(),
            "elsewhere": ELSEWHERE,
        }
        settings["threads"] = torch.get_num_threads()
        contents = harness.document("quality", settings, versions, {}, rows, {})
        print(f"written: {harness.save(contents, arguments.json or None)}", file=sys.stderr)


if __name__ == "__main__":
    main()
