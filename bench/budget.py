"""Time that a run may take, divided among its pieces. What a piece leaves over is there for those after it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence


class Budget:
    """Seconds from now on. Nothing is interrupted: whoever holds one asks, before it starts something, what is left."""

    def __init__(self, seconds: float = math.inf, now: Callable[[], float] = time.monotonic):
        if not seconds > 0:
            raise ValueError(f"seconds: expected more than 0, got {seconds}")
        self.now, self.end = now, now() + seconds

    @property
    def limited(self) -> bool:
        return self.end < math.inf

    def left(self) -> float:
        """Seconds; 0 when they are spent, infinity without a limit."""
        return max(0.0, self.end - self.now())

    def parts(self, weights: Sequence[float]) -> Iterator[Budget]:
        """A budget for each weight, made when asked for: its share, among those still to come, of what is left."""
        for i, weight in enumerate(weights):
            share = weight / sum(weights[i:])
            part = Budget(now=self.now)
            part.end = self.now() + self.left() * share
            yield part
