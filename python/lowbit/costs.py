"""What every width of the token embedding and of the head costs: bytes, time a token here, and KL divergence.

A table that both share is one choice; tables of their own are two. Packed candidates are rounded to nearest with groups
of 128, clipped up to 4 bits (calibrated ones lose less: docs/algorithms.md); the width that a part has now is measured
as it is.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from lowbit.evaluate import Totals, forward
from lowbit.matrix import PackedMatrix
from lowbit.models import embedding_and_head, module_like, replaced
from lowbit.nn import PackedModule

WIDTHS = (16, 8, 4)
GROUP_SIZE = 128
_MIN_CALLS = 5


@dataclass(frozen=True)
class Cost:
    """One choice for one part of a model.

    part: "embedding", "head" or "embedding and head"; modules: their names; format: of the weight; bytes: of the weight
    with its scales; microseconds: for one token, the median of calls one after another (lookup, product, or both);
    kl_divergence: nats a position of the model with this choice alone changed, from the reference; now: whether the
    model has it.
    """

    part: str
    modules: tuple[str, ...]
    format: str
    bytes: int
    microseconds: float
    kl_divergence: float | None
    now: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.inference_mode()
def measure(
    model: nn.Module,
    windows: Sequence[torch.Tensor],
    reference: nn.Module | None = None,
    widths: Sequence[int] = WIDTHS,
    seconds: float = 0.3,
    progress: Callable[[int, int], None] | None = None,
) -> list[Cost]:
    """The costs of every width, part by part.

    windows: token ids int64 [n] to measure the divergence on; reference: the model to measure it from, whose tables the
    candidates are made of (None: the model as it is, whose packed tables are unpacked for that); seconds: for each
    timing; progress(done, all) is called after each choice.
    ValueError: no embedding and no head; a reference with other tables.
    """
    names = embedding_and_head(model)
    parts: dict[tuple[str, ...], str] = {}
    if None not in names and _weight_key(model, names[0]) == _weight_key(model, names[1]):
        parts[names] = "embedding and head"
    else:
        parts |= {(name,): part for name, part in zip(names, ("embedding", "head"), strict=True) if name is not None}
    if not parts:
        raise ValueError("model: expected a token embedding or a head, found neither")
    expected = [forward(reference if reference is not None else model, ids)[0] for ids in windows]
    costs = []
    for modules, part in parts.items():
        now, weight = _weight(model, modules[0]), _weight(reference if reference is not None else model, modules[0])
        if tuple(weight.shape) != tuple(now.shape):
            raise ValueError(f"reference: {modules[0]}: expected shape {list(now.shape)}, got {list(weight.shape)}")
        dense = weight.unpack(_dtype(model)) if isinstance(weight, PackedMatrix) else weight.detach()
        for bits in widths:
            same = _bits(now) == bits
            choice = now if same else dense.to(_dtype(model)) if bits == 16 else _rounded(dense, bits)
            made = {name: module_like(name, model.get_submodule(name), choice) for name in modules}
            with replaced(model, made):
                costs.append(
                    Cost(
                        part=part,
                        modules=modules,
                        format=_format(choice),
                        bytes=choice.nbytes,
                        microseconds=sum(_time(module, _dtype(model), seconds) for module in made.values()),
                        kl_divergence=_divergence(model, windows, expected),
                        now=same,
                    )
                )
            if progress:
                progress(len(costs), len(parts) * len(widths))
    return costs


def _weight(model: nn.Module, name: str) -> PackedMatrix | torch.Tensor:
    module = model.get_submodule(name)
    packed = module.packed if isinstance(module, PackedModule) else None
    return module.weight if packed is None else packed


def _weight_key(model: nn.Module, name: str) -> int:
    weight = _weight(model, name)
    return (weight.codes if isinstance(weight, PackedMatrix) else weight).data_ptr()


def _rounded(weight: torch.Tensor, bits: int) -> PackedMatrix:
    group_size = GROUP_SIZE if weight.shape[1] > GROUP_SIZE else -1
    return PackedMatrix.from_float(weight, f"int{bits}", group_size, clip=bits <= 4)


def _bits(weight: PackedMatrix | torch.Tensor) -> int | float:
    return weight.bits if isinstance(weight, PackedMatrix) else 16


def _format(weight: PackedMatrix | torch.Tensor) -> str:
    return weight.format if isinstance(weight, PackedMatrix) else str(weight.dtype).removeprefix("torch.")


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _time(module: PackedModule, dtype: torch.dtype, seconds: float) -> float:
    """Microseconds of one token."""
    rows, cols = module.packed.shape if module.packed is not None else module.weight.shape
    device = module.weight.device
    generator = torch.Generator().manual_seed(0)
    if hasattr(module, "num_embeddings"):
        inputs = [id[None, None].to(device) for id in torch.randint(rows, (64,), generator=generator)]
    else:
        inputs = [torch.randn(1, 1, cols, generator=generator).to(device, dtype)]
    times: list[float] = []
    module(inputs[0])
    end = time.perf_counter() + seconds
    while len(times) < _MIN_CALLS or time.perf_counter() < end:
        x = inputs[len(times) % len(inputs)]
        start = time.perf_counter()
        module(x)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def _divergence(model: nn.Module, windows: Sequence[torch.Tensor], expected: list[torch.Tensor]) -> float | None:
    total = Totals()
    for ids, logits in zip(windows, expected, strict=True):
        total.add(ids.to(logits.device), forward(model, ids)[0], logits)
    return total.kl_divergence if total.positions else None
