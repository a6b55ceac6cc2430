"""The README's examples, run as they stand."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import lowbit

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)


@pytest.mark.parametrize("code", [code for language, code in BLOCKS if language == "python"])
def test_python_examples(code, monkeypatch):
    monkeypatch.chdir(ROOT)
    exec(compile(code, "README.md", "exec"), {})


def test_cpp_example(tmp_path):
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler on PATH")
    (source,) = (code for language, code in BLOCKS if language == "cpp")
    (tmp_path / "example.cpp").write_text(source)
    package = Path(lowbit.__file__).parent
    library = package / "lib" / "liblowbit.so.0"
    flags = ["-std=c++17", "-Wall", "-Werror", f"-I{package / 'include'}", f"-Wl,-rpath,{library.parent}"]
    subprocess.run([compiler, *flags, "example.cpp", str(library), "-o", "example"], cwd=tmp_path, check=True)
    done = subprocess.run(["./example"], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert "int4_matmul__" in done.stdout and "ids[0]: expected a row in [0, 64), got 64" in done.stdout


def test_files_the_readme_points_at_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), target
