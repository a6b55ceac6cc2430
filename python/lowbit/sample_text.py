"""Text that every Python has: source of its standard library, for calibrating and evaluating when no text is
given.

Deterministic for one interpreter version. Calibration and evaluation draw on different modules, so that a
figure measured with the defaults is not measured on the text that the model was calibrated with.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

CALIBRATION_MODULES = (
    "argparse.py",
    "ast.py",
    "collections/__init__.py",
    "concurrent/futures/thread.py",
    "csv.py",
    "email/message.py",
    "http/client.py",
    "json/decoder.py",
    "logging/__init__.py",
    "queue.py",
    "random.py",
    "subprocess.py",
    "tarfile.py",
    "threading.py",
    "urllib/parse.py",
)
EVALUATION_MODULES = (
    "bisect.py",
    "calendar.py",
    "cmd.py",
    "fractions.py",
    "graphlib.py",
    "heapq.py",
    "sched.py",
    "shelve.py",
    "statistics.py",
    "textwrap.py",
)


def calibration_text(characters: int = 70_000) -> list[str]:
    """`characters` in all, from the beginnings of CALIBRATION_MODULES. FileNotFoundError: no sources."""
    return _beginnings(CALIBRATION_MODULES, characters)


def evaluation_text(characters: int = 70_000) -> list[str]:
    """`characters` in all, from the beginnings of EVALUATION_MODULES. FileNotFoundError: no sources."""
    return _beginnings(EVALUATION_MODULES, characters)


def _beginnings(modules: tuple[str, ...], characters: int) -> list[str]:
    library = Path(sysconfig.get_paths()["stdlib"])
    # Some installations ship bytecode only, and a module may move between versions: take those that are
    # there.
    sources = [(library / module).read_text("utf-8") for module in modules if (library / module).is_file()]
    texts: list[str] = []
    missing = characters
    # Shortest first: what a short module lacks of its share goes to the longer ones.
    for left, text in zip(range(len(sources), 0, -1), sorted(sources, key=len), strict=True):
        texts.append(text[: missing // left])
        missing -= len(texts[-1])
    if not texts:
        raise FileNotFoundError(f"{library}: no source text of the standard library; give a text file")
    return texts
