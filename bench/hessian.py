"""How to accumulate a Hessian on a CPU: products of bf16 inputs in float32, or in bf16 with float32 sums.

    python bench/hessian.py [--cols 4096] [--tokens 2048] [--threads 2] [--json]

Inputs are bf16, as those of a bf16 model are, so every product is exact either way; the ways differ in speed and in how
the sums round. "float32" is lowbit.quantize.hessian as it is. "bf16, float32 sums" is the same code while torch lets
oneDNN take float32 operands as bf16. "bf16" is torch's product of bf16 tensors, whose result is bf16. Errors are
against float64, relative to the norm, of the first 512 rows. Medians of --rounds rounds in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from lowbit.quantize.hessian import Hessian

ROWS = 512  # that are compared


def in_float32(x: torch.Tensor) -> torch.Tensor:
    hessian = Hessian(x.shape[1])
    hessian.add(x)
    return hessian._sum


def in_bf16(x: torch.Tensor) -> torch.Tensor:
    matmul = torch.backends.mkldnn.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        return in_float32(x)
    finally:
        matmul.fp32_precision = before


def rounded_to_bf16(x: torch.Tensor) -> torch.Tensor:
    return (x.T @ x).float()


WAYS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "float32": in_float32,
    "bf16, float32 sums": in_bf16,
    "bf16": rounded_to_bf16,
}


def run(cols: int, tokens: int, threads: int, rounds: int) -> dict:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    x = torch.randn(tokens, cols).bfloat16()
    exact = x[:, :ROWS].double().T @ x.double()
    errors, seconds = {}, {name: [] for name in WAYS}
    for name, way in WAYS.items():
        errors[name] = ((way(x)[:ROWS] - exact).norm() / exact.norm()).item()
    for _ in range(rounds):
        for name, way in WAYS.items():
            start = time.perf_counter()
            way(x)
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    return {"cols": cols, "tokens": tokens, "threads": threads, "seconds": medians, "errors": errors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("cols", 4096), ("tokens", 2048), ("threads", 2), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    args = parser.parse_args()
    figures = run(args.cols, args.tokens, args.threads, args.rounds)
    if args.json:
        print(json.dumps(figures))
        return
    print(f"{args.tokens} tokens of {args.cols} columns, {args.threads} threads")
    for name, seconds in figures["seconds"].items():
        ratio = figures["seconds"]["float32"] / seconds
        print(f"  {name:<20} {seconds:7.3f} s  {ratio:5.2f} times as fast  error {figures['errors'][name]:.1e}")


if __name__ == "__main__":
    main()
