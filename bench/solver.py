"""The compiled GPTQ solver against the reference algorithm in torch (tests/python/reference_gptq.py) in one run.

    python bench/solver.py [--rows 4096] [--cols 4096] [--bits 4] [--group-size 128] [--threads 2] [--json]

Both get the same weights, factor and dtype of scales and make their own grids. The share of the roofline is that of
N * K^2 floating-point operations against torch's matrix product of 4096 x 4096 in the same run, median of three.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

from lowbit import _C

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "python"))
from reference_gptq import gptq


def problem(rows: int, cols: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [rows, cols] and a well-conditioned factor: any upper triangle with a positive diagonal is one."""
    torch.manual_seed(0)
    weight = 0.02 * torch.randn(rows, cols)
    factor = torch.randn(cols, cols).mul_(0.3 * cols**-0.5).triu_(1)
    factor.diagonal().uniform_(0.8, 1.2)
    return weight, factor


def solve(weight: torch.Tensor, factor: torch.Tensor, bits: int, group_size: int, clip: bool):
    """Codes and scales of the compiled solver, symmetric, fp16 scales."""
    rows, cols = weight.shape
    codes = torch.empty(rows, cols, dtype=torch.uint8)
    scales = torch.empty(rows, -(-cols // group_size))
    _C.gptq_solve(
        format=bits,
        rows=rows,
        cols=cols,
        group_size=group_size,
        symmetric=True,
        clip=clip,
        static_grids=False,
        scale_dtype=_C.F16,
        block_size=0,
        weight=weight.data_ptr(),
        factor=factor.data_ptr(),
        group_index=0,
        codes=codes.data_ptr(),
        scales=scales.data_ptr(),
        zeros=0,
        loss=0,
    )
    return codes, scales


def timed(call, repeats: int) -> tuple[float, object]:
    """Median seconds of some calls, and the last result."""
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds), result


def run(rows: int, cols: int, bits: int, group_size: int, threads: int, clip: bool) -> dict:
    torch.set_num_threads(threads)
    _C.set_threads(threads)
    weight, factor = problem(rows, cols)
    solve(weight, factor, bits, group_size, clip)  # the first call starts the threads
    ours, (codes, scales) = timed(lambda: solve(weight, factor, bits, group_size, clip), 3)
    reference, (expected, expected_scales, _, _) = timed(
        lambda: gptq(weight, factor, bits=bits, group_size=group_size, clip=clip), 1
    )
    again, _ = timed(lambda: solve(weight, factor, bits, group_size, clip), 3)
    ours = statistics.mean([ours, again])  # before and after, since the machine may have changed its mind
    square = torch.randn(4096, 4096)
    product, _ = timed(lambda: square @ square, 3)
    return {
        "shape": [rows, cols],
        "bits": bits,
        "group_size": group_size,
        "clip": clip,
        "threads": threads,
        "kernel": _C.last_kernel("solve"),
        "reference_seconds": reference,
        "solver_seconds": ours,
        "ratio": reference / ours,
        "gflops": rows * cols**2 / ours / 1e9,
        "matmul_gflops": 2 * 4096**3 / product / 1e9,
        "equal_codes": (codes == expected).float().mean().item(),
        "equal_scales": (scales == expected_scales).float().mean().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 4096), ("cols", 4096), ("bits", 4), ("group-size", 128), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--clip", action="store_true", help="search the clipping of every group")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    args = parser.parse_args()
    figures = run(args.rows, args.cols, args.bits, args.group_size, args.threads, args.clip)
    if args.json:
        print(json.dumps(figures))
        return
    print(f"{args.rows}x{args.cols} int{args.bits} g{args.group_size}, {args.threads} threads, {figures['kernel']}")
    print(f"  torch reference {figures['reference_seconds']:8.3f} s")
    print(f"  solver          {figures['solver_seconds']:8.3f} s   ratio {figures['ratio']:.1f}")
    print(f"  {figures['gflops']:.0f} GFLOP/s; torch's matrix product {figures['matmul_gflops']:.0f}")
    print(f"  equal codes {figures['equal_codes']:.5f}, equal scales {figures['equal_scales']:.5f}")


if __name__ == "__main__":
    main()
