"""What is installed: one package with the library, its headers and its CMake and pkg-config files, and nothing stale.

The installed package is the one that `import lowbit` finds: the wheel under `make test`, an in-place build otherwise.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import lowbit
from lowbit import _C

ROOT = Path(__file__).parents[2]
CONSUMER = ROOT / "tests" / "consumer"
PACKAGE = Path(lowbit.__file__).parent
LIBRARY = PACKAGE / "lib" / "liblowbit.so.0"
# The environment's own tools first: cmake, ninja and pkgconf come from PyPI where the system has none.
TOOLS = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
ENVIRONMENT = {**os.environ, "PATH": TOOLS, "PYTHONPATH": str(PACKAGE.parent)}


def tool(*names: str) -> str:
    for name in names:
        if found := shutil.which(name, path=TOOLS):
            return found
    pytest.fail(f"none of {', '.join(names)} on PATH: the `dev` and `test` extras bring them")


def run(*command, **options) -> str:
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, **{"env": ENVIRONMENT, **options}
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout


def symbols(library: Path) -> set[str]:
    """Names of the dynamic symbols that a library defines."""
    return {line.split()[-1] for line in run(tool("nm"), "-D", "--defined-only", library).splitlines()}


# -- the package -----------------------------------------------------------------------------------------------------


def test_package_holds_the_library_and_what_consumers_need():
    expected = [
        "py.typed",
        "_C.pyi",
        "lib/liblowbit.so.0",
        "lib/cmake/lowbit/lowbitConfig.cmake",
        "lib/cmake/lowbit/lowbitConfigVersion.cmake",
        "lib/cmake/lowbit/lowbitTargets.cmake",
        "lib/pkgconfig/lowbit.pc",
        "include/lowbit/lowbit.h",
        "include/lowbit/lowbit.hpp",
        "include/lowbit/formats.h",
    ]
    assert [name for name in expected if not (PACKAGE / name).is_file()] == []


def test_versions_agree():
    (declared,) = re.findall(r"project\(lowbit VERSION ([0-9.]+)", (ROOT / "CMakeLists.txt").read_text())
    assert lowbit.__version__ == declared
    assert f"Version: {declared}" in (PACKAGE / "lib/pkgconfig/lowbit.pc").read_text()
    installed = [d for d in metadata.distributions(path=[str(PACKAGE.parent)]) if d.name == "lowbit"]
    assert [d.version for d in installed] in ([], [declared])  # an in-place build has no metadata


def test_library_exports_the_c_api_and_nothing_else():
    declared = set(
        re.findall(r"^LOWBIT_API [^;]*?\b(lowbit_\w+)\(", (ROOT / "csrc/include/lowbit/lowbit.h").read_text(), re.M)
    )
    assert symbols(LIBRARY) == declared


def test_extension_exports_its_entry_point_and_nothing_else():
    assert symbols(Path(_C.__file__)) == {"PyInit__C"}


def test_nothing_is_linked_against_torch_or_python():
    for binary in (LIBRARY, Path(_C.__file__)):
        needed = re.findall(r"NEEDED.*\[(.*)\]", run(tool("readelf"), "-d", binary))
        assert needed and not [name for name in needed if re.match(r"lib(torch|c10|python|cuda)", name)], needed


def test_one_openmp_runtime_in_the_process():
    """torch's and ours are the same libgomp: two would mean two thread pools fighting for the same cores."""
    script = (
        "import lowbit, torch\n"
        "torch.ones(512, 512) @ torch.ones(512, 512)\n"
        "w = lowbit.PackedMatrix.from_float(torch.ones(512, 512), 'int4')\n"
        "w.matmul(torch.ones(64, 512))\n"
        "maps = open('/proc/self/maps').read().split()\n"
        "print(*sorted({path for path in maps if 'libgomp' in path or 'libiomp' in path or 'libomp' in path}))\n"
        "print(lowbit._C.executor())\n"
    )
    runtimes, executor = run(sys.executable, "-c", script).splitlines()
    assert executor == "openmp"
    assert len(runtimes.split()) == 1 and "libgomp" in runtimes, runtimes


# -- the stubs -------------------------------------------------------------------------------------------------------


def stub_signature(function: ast.FunctionDef) -> tuple[list[str], str]:
    names = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
    return [name for name in names if name != "self"], ast.unparse(function.returns)


def built_signature(member) -> tuple[list[str], str]:
    """Names of the arguments and the type of the result, from the first line that pybind11 writes."""
    text = (member.fget if isinstance(member, property) else member).__doc__.splitlines()[0]
    arguments, result = re.fullmatch(r"\w*\((.*)\) -> (.*)", text).groups()
    return [name for name in re.findall(r"(?:^|, )(\w+): ", arguments) if name != "self"], result


def test_stubs_name_every_member_of_the_extension():
    tree = ast.parse((ROOT / "python/lowbit/_C.pyi").read_text())
    stubs = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    constants = {node.target.id: ast.unparse(node.annotation) for node in tree.body if isinstance(node, ast.AnnAssign)}
    built = {name: value for name, value in vars(_C).items() if not name.startswith("__") or name == "__version__"}
    assert set(stubs) | set(constants) == set(built)
    for name, annotation in constants.items():
        assert type(built[name]).__name__ == annotation, name
    for name, node in stubs.items():
        if isinstance(node, ast.FunctionDef):
            assert stub_signature(node) == built_signature(built[name]), name
            continue
        methods = {method.name: method for method in node.body if isinstance(method, ast.FunctionDef)}
        methods.pop("__buffer__", None)  # the buffer protocol has no attribute before Python 3.12
        public = {method for method in vars(built[name]) if not method.startswith("_")} | {"__init__"}
        assert set(methods) == public, name
        for method in methods:
            assert stub_signature(methods[method]) == built_signature(getattr(built[name], method)), f"{name}.{method}"


# -- programs that use the library -----------------------------------------------------------------------------------


@pytest.mark.parametrize("flag, folder", [("--cmakedir", "lib/cmake/lowbit"), ("--pkgconfigdir", "lib/pkgconfig")])
def test_the_package_tells_where_its_files_are(flag, folder):
    printed = run(sys.executable, "-m", "lowbit", flag).strip()
    assert Path(printed).samefile(PACKAGE / folder)


def test_consumers_by_find_package(tmp_path):
    run(
        tool("cmake"),
        *("-S", CONSUMER, "-B", tmp_path, "-DCMAKE_BUILD_TYPE=Release"),
        f"-Dlowbit_DIR={PACKAGE / 'lib/cmake/lowbit'}",
    )
    run(tool("cmake"), "--build", tmp_path)
    output = run(tool("ctest"), "--test-dir", tmp_path, "--output-on-failure")
    assert re.search(r"100% tests passed.* out of 2$", output, re.M), output


def test_consumers_by_pkg_config(tmp_path):
    environment = {**ENVIRONMENT, "PKG_CONFIG_PATH": str(PACKAGE / "lib/pkgconfig")}
    pkg_config = tool("pkg-config", "pkgconf")
    assert run(pkg_config, "--modversion", "lowbit", env=environment).strip() == lowbit.__version__
    output = run(tool("make"), "-C", CONSUMER, "check", f"OUT={tmp_path}", f"PKG_CONFIG={pkg_config}", env=environment)
    assert f"C {lowbit.__version__}: every value as expected" in output
    assert f"C++ {lowbit.__version__}: every value as expected" in output


def test_another_minor_version_is_refused(tmp_path):
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.22)\nproject(other LANGUAGES C)\nfind_package(lowbit 0.99 CONFIG REQUIRED)\n"
    )
    done = subprocess.run(
        [tool("cmake"), "-S", tmp_path, "-B", tmp_path / "build", f"-Dlowbit_DIR={PACKAGE / 'lib/cmake/lowbit'}"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert done.returncode != 0 and 'compatible with requested version "0.99"' in " ".join(done.stderr.split())


# -- the archives ----------------------------------------------------------------------------------------------------

# What an in-place build leaves behind, of this Python or another, and in older versions perhaps under other names.
STALE = [
    f"python/lowbit/{Path(_C.__file__).name}",
    "python/lowbit/_C.cpython-39-x86_64-linux-gnu.so",
    "python/lowbit/lib/liblowbit.so.9",
    "python/lowbit/lib/cmake/lowbit/stale.cmake",
    "python/lowbit/include/lowbit/stale.h",
    "python/lowbit/__pycache__/stale.cpython-311.pyc",
]


@pytest.fixture(scope="module")
def dirty_tree(tmp_path_factory) -> Path:
    """A copy of the sources with stale build products in it. No .git: an unpacked archive has none either."""
    tree = tmp_path_factory.mktemp("tree")
    ignored = shutil.ignore_patterns("build", "dist", "data", "__pycache__", "_C*.so", ".*")
    for name in ("csrc", "python", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for name in ("CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, tree)
    for name in STALE:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(b"stale")
    return tree


def build_archive(tree: Path, kind: str, out: Path, settings: dict[str, str]) -> Path:
    script = f"from scikit_build_core.build import build_{kind}; build_{kind}({str(out)!r}, {settings!r})"
    run(sys.executable, "-c", script, cwd=tree)
    (archive,) = out.iterdir()
    return archive


def test_sdist_is_complete_and_clean(dirty_tree, tmp_path):
    pytest.importorskip("scikit_build_core")
    with tarfile.open(build_archive(dirty_tree, "sdist", tmp_path / "dist", {})) as archive:
        top = {name.split("/")[0] for name in archive.getnames()}
        files = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
        archive.extractall(tmp_path / "unpacked", filter="data")
    assert top == {f"lowbit-{lowbit.__version__}"}
    assert files.isdisjoint(STALE) and not [name for name in files if "stale" in name or name.endswith(".so")]
    products = ("python/lowbit/lib/", "python/lowbit/include/")
    sources = {
        path.relative_to(dirty_tree).as_posix()
        for folder in ("csrc", "python", "tests/cpp", "tests/consumer")
        for path in (dirty_tree / folder).rglob("*")
        if path.is_file()
    }
    assert {name for name in sources - files if not name.startswith(products)} <= set(STALE)
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    run(tool("cmake"), "-S", unpacked, "-B", tmp_path / "build", "-DLOWBIT_PYTHON=OFF", "-DLOWBIT_TESTS=ON")


def test_wheel_takes_no_file_of_an_in_place_build(dirty_tree, tmp_path):
    """Built without CMake, a wheel holds what is copied from the tree: sources only, whatever lies beside them."""
    pytest.importorskip("scikit_build_core")
    settings = {"wheel.cmake": "false", "build-dir": str(tmp_path / "build")}
    with zipfile.ZipFile(build_archive(dirty_tree, "wheel", tmp_path / "dist", settings)) as archive:
        names = archive.namelist()
    assert "lowbit/__init__.py" in names and "lowbit/_C.pyi" in names and "lowbit/py.typed" in names
    assert not [name for name in names if re.search(r"\.so|/lib/|/include/|__pycache__|stale", name)]


# -- the choice of CUDA ----------------------------------------------------------------------------------------------


def configure(tmp_path: Path, choice: str, path: str) -> subprocess.CompletedProcess:
    environment = {**ENVIRONMENT, "PATH": path}
    environment.pop("CUDACXX", None)
    return subprocess.run(
        [tool("cmake"), "-S", ROOT, "-B", tmp_path, "-DLOWBIT_PYTHON=OFF", f"-DLOWBIT_CUDA={choice}"],
        capture_output=True,
        text=True,
        env=environment,
    )


@pytest.fixture
def no_nvcc(tmp_path):
    """A PATH with a C++ compiler and nothing else on it."""
    links = tmp_path / "bin"
    links.mkdir()
    for name in ("c++", "cc", "as", "ld", "ar", "ranlib", "make"):
        (links / name).symlink_to(tool(name))
    return str(links)


@pytest.mark.parametrize("choice", ["AUTO", "OFF"])
def test_configures_without_nvcc(tmp_path, no_nvcc, choice):
    done = configure(tmp_path / "build", choice, no_nvcc)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "CUDA library: not built" in done.stdout


def test_cuda_on_says_what_is_missing(tmp_path, no_nvcc):
    done = configure(tmp_path / "build", "ON", no_nvcc)
    assert done.returncode != 0
    assert "LOWBIT_CUDA=ON: no nvcc was found; set CUDACXX" in " ".join(done.stderr.split())


def test_cuda_choice_is_one_of_three(tmp_path):
    done = configure(tmp_path, "maybe", TOOLS)
    assert done.returncode != 0
    assert "LOWBIT_CUDA: expected AUTO, ON or OFF, got maybe" in " ".join(done.stderr.split())
