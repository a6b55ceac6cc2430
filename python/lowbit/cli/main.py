"""The entry point of `lowbit` and `python -m lowbit`: parses, runs one command, turns errors into exit codes.

Exit codes: 0 success, 1 failure, 2 bad input (arguments, files, values), 130 interrupted, 141 the reader of
our output went away. Errors are one line on stderr; --debug shows the traceback.
"""

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

FAILURE, BAD_INPUT, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141

# What a wrong argument, path or file raises in this library; anything else is a failure of the run or of
# lowbit.
_BAD_INPUT_ERRORS = (
    ValueError,
    TypeError,
    IndexError,
    NotImplementedError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
)

# Options that take several files, as a shell's *.txt gives them; typer knows one value an option.
_FILE_OPTIONS = ("--calibration", "--text")

# Folders of the installed package that build systems ask for.
_FOLDERS = {"--cmakedir": "lib/cmake/lowbit", "--pkgconfigdir": "lib/pkgconfig"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (default: the process's own) and returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show "→" is no reason to fail
    try:
        if len(argv) == 1 and argv[0] in _FOLDERS:
            return _print_folder(_FOLDERS[argv[0]])
        if argv == ["--version"]:
            return _print_version()
        code = _run(argv)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout at exit and would complain again: give it somewhere to write.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


def _print_folder(folder: str) -> int:
    path = Path(__file__).resolve().parents[1] / folder
    if not path.is_dir():
        print(f"error: {path}: not there; the C++ library is not installed with this package", file=sys.stderr)
        return FAILURE
    print(path)
    return 0


def _print_version() -> int:
    try:
        # Not lowbit.__version__: that imports torch first, which only matters to a process that goes on.
        from lowbit import _C
    except ImportError as error:
        print(f"error: the native library does not load: {error}", file=sys.stderr)
        return FAILURE
    print(f"lowbit {_C.__version__}")
    return 0


def _run(argv: list[str]) -> int:
    try:
        import rich  # noqa: F401
        import typer
    except ImportError as error:
        print(f"error: the command line needs {error.name}: pip install 'lowbit[cli]'", file=sys.stderr)
        return FAILURE

    debug = "--debug" in argv[: argv.index("--")] if "--" in argv else "--debug" in argv
    command = typer.main.get_command(_app())
    try:
        # make_context and invoke instead of command(): that would exit the process and print errors its own
        # way.
        with command.make_context("lowbit", _repeat_file_options(argv) or ["--help"]) as context:
            command.invoke(context)
    except typer.Exit as exit_:
        return exit_.exit_code
    except typer.Abort:
        raise KeyboardInterrupt from None
    except BrokenPipeError:
        raise
    except Exception as error:
        if debug:
            traceback.print_exception(error)
        print(f"error: {_describe(error)}", file=sys.stderr)
        return BAD_INPUT if _is_bad_input(error) else FAILURE
    return 0


def _repeat_file_options(argv: list[str]) -> list[str]:
    """`MODEL --text a b` becomes `MODEL --text a --text b`. Only behind the model: else the last word is it."""
    if len(argv) < 2 or argv[1].startswith("-"):
        return argv
    spread: list[str] = []
    option = None
    for index, word in enumerate(argv):
        if word == "--":
            return spread + argv[index:]
        if word.startswith("-"):
            option = word if word in _FILE_OPTIONS else None
            spread.append(word)
        elif option is not None and spread[-1] != option:
            spread += [option, word]
        else:
            spread.append(word)
    return spread


def _is_bad_input(error: Exception) -> bool:
    # Parser errors have an exit_code; their class moved between typer's versions.
    return isinstance(error, _BAD_INPUT_ERRORS) or getattr(error, "exit_code", None) == BAD_INPUT


def _describe(error: Exception) -> str:
    """One line: what a user can act on."""
    if hasattr(error, "format_message"):
        context = getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context else ""
        return f"{' '.join(error.format_message().split())}{hint}"
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = lines[0] if lines else ""
    if _is_bad_input(error) or (isinstance(error, (OSError, RuntimeError)) and message):
        return message or type(error).__name__
    return f"{type(error).__name__}: {message} (a bug in lowbit? --debug shows where)"


def _app():
    import typer

    from lowbit.cli import bench, doctor, evaluate, generate, head, inspect, quantize, sensitivity, ternarize
    from lowbit.cli.terminal import DebugOption

    app = typer.Typer(
        name="lowbit",
        add_completion=False,
        pretty_exceptions_enable=False,
        # Boxes and colours on a terminal, plain text in a pipe.
        rich_markup_mode="rich" if sys.stdout.isatty() else None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def options(
        version: bool = typer.Option(False, "--version", help="Print the version and exit."),
        cmakedir: bool = typer.Option(False, "--cmakedir", help="Print the folder of lowbit's CMake package and exit."),
        pkgconfigdir: bool = typer.Option(False, "--pkgconfigdir", help="Print the folder of lowbit.pc and exit."),
        debug: DebugOption = False,
    ) -> None:
        """Low-bit weights for language models."""
        for given, option in (
            (version, "--version"),
            (cmakedir, "--cmakedir"),
            (pkgconfigdir, "--pkgconfigdir"),
        ):
            if given:
                raise ValueError(f"{option}: expected alone, without other arguments")

    app.command("quantize")(quantize.quantize)
    app.command("ternarize")(ternarize.ternarize)
    app.command("sensitivity")(sensitivity.sensitivity)
    app.command("inspect")(inspect.inspect)
    app.command("head")(head.head)
    app.command("eval")(evaluate.evaluate)
    app.command("generate")(generate.generate)
    app.command("doctor")(doctor.doctor)
    app.command("bench")(bench.bench)
    return app
