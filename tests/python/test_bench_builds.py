"""bench/builds.py, which compares builds of liblowbit: with the one that is here, twice, and with one that lies."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest
import torch

import lowbit

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))

import blocking  # noqa: E402
import builds  # noqa: E402
import capi  # noqa: E402

from lowbit import abi  # noqa: E402

LIBRARY = Path(lowbit.__file__).parent / "lib" / "liblowbit.so.0"


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(blocking, "MEGABYTES", 1)
    monkeypatch.setattr(blocking, "LINES", 2000)
    monkeypatch.setattr(blocking, "SECONDS", 0.001)


@pytest.mark.parametrize("format", abi.FORMATS)
def test_a_product_is_that_of_the_package(small, format):
    windows = blocking.windows(blocking.make_arena(), format, 640)
    x = torch.randn(3, 640)
    for activations in abi.ACTIVATIONS:
        y = torch.empty(3, windows[1].rows)
        builds.Build(LIBRARY).matmul(builds.view(windows[1], abi.FORMATS[format]), x, y, activations)
        assert torch.equal(y, windows[1].matmul(x, activations=activations))


def test_other_bits_are_seen(small):
    class Lying(builds.Build):
        def matmul(self, matrix, x, y, activations):
            super().matmul(matrix, x, y, activations)
            y[0, 0] += 1

    windows = blocking.windows(blocking.make_arena(), "int4", 512)
    matrices = [builds.view(m, 4) for m in windows]
    honest, lying = builds.Build(LIBRARY), Lying(LIBRARY)
    found = builds.compare([honest, honest, lying], matrices, torch.randn(1, 512), "float", rounds=3)
    assert [same for _, _, same in found] == [True, True, False]
    assert found[0][1] == 1 and all(seconds > 0 and gain > 0 for seconds, gain, _ in found)


def test_an_error_is_the_library_s_own(small):
    matrix = builds.view(blocking.windows(blocking.make_arena(), "int4", 512)[0], 4)
    matrix.codes = ctypes.c_void_p()
    with pytest.raises(capi.LowbitError, match=r"liblowbit.*codes"):
        builds.Build(LIBRARY).matmul(matrix, torch.zeros(1, 512), torch.empty(1, matrix.rows), "float")


def test_the_command(small, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["builds.py", str(LIBRARY), str(LIBRARY), "--formats", "int3", "--columns", "512", "--rounds", "2"]
    )
    builds.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[2].startswith("| int3, float, 512 columns, 1 | ") and "other" not in lines[3]
