"""The command line as a user meets it: exit codes, what goes to which stream, what the commands do to a tiny model."""

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lowbit import _C
from lowbit.cli.main import _repeat_file_options, main

TEXT = "def add(a, b):\n    return a + b\n\nfor i in range(10):\n    print(add(i, 1))\n" * 40
CODE_MODEL = Path(__file__).parents[1] / "data" / "tiny-llama-code"
ANSI = re.compile("\x1b\\[")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Matrices as small as these gain nothing from threads, and lose much on a machine that is busy."""
    before, kernels_before = torch.get_num_threads(), _C.threads()
    torch.set_num_threads(1)
    _C.set_threads(1)
    yield
    torch.set_num_threads(before)
    _C.set_threads(kernels_before)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random Llama of two layers with a tied head and a byte-level BPE tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.py"
    path.write_text(TEXT, "utf-8")
    return path


@pytest.fixture(scope="module")
def quantized(model, text, tmp_path_factory):
    """The model in 4 bits with its shared table in 8."""
    output = tmp_path_factory.mktemp("quantized")
    arguments = ["--group-size", "32", "--rule", "embed_tokens=8", "--calibration", str(text), "--samples", "4"]
    assert main(["quantize", str(model), "-o", str(output), *arguments]) == 0
    return output


def run_json(capsys, *arguments):
    """Runs a command with --json: its one object and what it wrote to stderr."""
    capsys.readouterr()
    code = main([*map(str, arguments), "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    value = json.loads(captured.out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert isinstance(value, dict)
    assert not ANSI.search(captured.out + captured.err)
    return value, captured.err


def run_error(capsys, *arguments):
    """Runs a command that fails: its exit code and the one line it wrote to stderr."""
    code = main([*map(str, arguments)])
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    return code, lines[0].removeprefix("error: ")


# ---- without torch, without typer ----


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_help_version_and_folders_do_not_import_torch():
    done = run_python(
        "import sys\n"
        "from lowbit.cli.main import main\n"
        "codes = [main([a]) for a in ('--help', '--version', '--cmakedir', '--pkgconfigdir')]\n"
        "codes += [main([c, '--help']) for c in ('quantize', 'sensitivity', 'inspect', 'eval', 'generate')]\n"
        "codes += [main([c, '--help']) for c in ('ternarize', 'doctor', 'bench')]\n"
        "assert codes == [0] * 12, codes\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
    )
    assert done.returncode == 0, done.stderr
    assert not ANSI.search(done.stdout)
    assert re.search(r"^lowbit \d+\.\d+\.\d+$", done.stdout, re.MULTILINE)
    folders = [Path(line) for line in done.stdout.splitlines() if line.startswith("/")]
    assert (folders[0] / "lowbitConfig.cmake").is_file()
    assert (folders[1] / "lowbit.pc").is_file()


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra_the_command_says_what_to_install(missing):
    done = run_python(
        f"import sys\nsys.modules[{missing!r}] = None\n"
        "from lowbit.cli.main import main\n"
        "assert main(['--cmakedir']) == 0\nsys.exit(main(['doctor']))\n"
    )
    assert done.returncode == 1
    assert done.stderr == f"error: the command line needs {missing}: pip install 'lowbit[cli]'\n"


def test_python_m_lowbit_is_the_same_command():
    done = subprocess.run([sys.executable, "-m", "lowbit", "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert "Usage: lowbit " in done.stdout


def test_no_arguments_show_the_help(capsys):
    assert main([]) == 0
    assert "quantize" in capsys.readouterr().out


def test_a_reader_that_goes_away_is_no_error(model):
    process = subprocess.Popen(
        [sys.executable, "-m", "lowbit", "inspect", str(model)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=120) == 141
    assert errors == b""


# ---- errors ----


@pytest.mark.parametrize(
    "words, message",
    [
        ("quantize {model}", "Missing option '-o' / '--output'. (see lowbit quantize --help)"),
        ("frobnicate", "No such command 'frobnicate'"),
        ("inspect {model} --frobnicate", "No such option"),
        ("--version doctor", "--version: expected alone, without other arguments"),
        ("inspect {missing}", "missing: no such model folder or file"),
        ("eval {missing}", "missing: no such model folder"),
        ("eval {model} --text {missing}", "missing: No such file or directory"),
        ("eval {model} --dtype int7", "dtype: expected one of float32, bfloat16, float16, got 'int7'"),
        ("eval {model} --context 1", "context: expected at least 2 tokens, got 1"),
        ("generate {model} {nothing}", "prompt: expected at least one token"),
        ("quantize {model} -o {out} --bits 5", "bits: expected one of trit, 2, 3, 4, 8, 16, got 5"),
        ("quantize {model} -o {out} --correction more", "correction: expected one of none, least_squares, got 'more'"),
        ("quantize {model} -o {out} --format zip", "format: expected one of lowbit, gptq, gptq_v2, bitnet, "),
        ("quantize {model} -o {out} --rule nowhere=8", "matches no matrix of the model"),
        ("quantize {model} -o {model}", "expected another folder than the model's own"),
        ("quantize {model} -o {quantized}", "not empty (--force writes into it)"),
        ("quantize {model} -o {file}", "file: expected a folder, got a file"),
        ("quantize {quantized} -o {out}", "expected a model that is not quantized, got 'lowbit'"),
        (
            "quantize {model} -o {out} --budget 3miles",
            "budget: expected bits a weight such as 2.5 or 2.5bits, or bytes",
        ),
        ("quantize {model} -o {out} --budget 1bits --samples 2", "budget: expected at least"),
        ("quantize {model} -o {out} --budget 5 --bits 4", "--budget: expected without --bits"),
        ("quantize {model} -o {out} --recipe {file} --rule a=4", "--recipe: expected without --rule"),
        ("quantize {model} -o {out} --recipe {file}", "file: expected a recipe in JSON (Expecting value"),
        ("sensitivity {quantized}", "expected a model that is not quantized, got 'lowbit'"),
        ("sensitivity {model} --formats 5", "bits: expected one of trit, 2, 3, 4, 8, 16, got 5"),
        ("sensitivity {model} --groups heads", "groups: expected one of modules, projections, kinds, got 'heads'"),
        ("sensitivity {model} --samples 1", "calibration: expected at least 2 windows, one to be held out, got 1"),
        ("sensitivity {model} -o r.json", "output: expected with --budget"),
        ("sensitivity {model} --plot {out}.png", "out.png: expected a file .html in a folder that is there"),
        ("bench --format int5", "format: expected one of int2, int3, int4, int8, trit, trit-int2, got 'int5'"),
        ("bench --shape 64", "shape: expected ROWSxCOLS such as 4096x11008, got '64'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, model, quantized, tmp_path, words, message):
    (tmp_path / "file").write_text("x")
    places = {"model": model, "quantized": quantized, "nothing": ""}
    places |= {name: tmp_path / name for name in ("missing", "out", "file")}
    capsys.readouterr()  # what the fixtures printed
    code, line = run_error(capsys, *[word.format(**places) for word in words.split()])
    assert code == 2
    assert message in line


def test_tables_do_not_fit_gptq_and_nothing_is_written(capsys, model, tmp_path):
    out = tmp_path / "out"
    code, line = run_error(
        capsys,
        "quantize",
        model,
        "-o",
        out,
        "--format",
        "gptq",
        "--embed-bits",
        "8",
        "--head-bits",
        "8",
        "--method",
        "rtn",
    )
    assert code == 2 and "format gptq holds linear layers only" in line
    assert list(out.iterdir()) == []


def test_debug_shows_the_traceback(capsys, tmp_path):
    assert main(["inspect", str(tmp_path / "missing"), "--debug"]) == 2
    captured = capsys.readouterr()
    assert "Traceback" in captured.err
    assert captured.err.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    "error, code, message",
    [
        (RuntimeError("the machine is on fire\nreally"), 1, "the machine is on fire"),
        (OSError("disk full"), 1, "disk full"),
        (MemoryError(), 1, "MemoryError"),
        (KeyError("x"), 1, "KeyError: 'x' (a bug in lowbit? --debug shows where)"),
        (NotImplementedError("no AVX-512 here"), 2, "no AVX-512 here"),
        (IndexError("id 7"), 2, "id 7"),
    ],
)
def test_errors_of_a_command(capsys, monkeypatch, error, code, message):
    monkeypatch.setattr("lowbit.doctor.examine", lambda: (_ for _ in ()).throw(error))
    got, line = run_error(capsys, "doctor")
    assert got == code
    assert line.startswith(message)


def test_ctrl_c(capsys, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr("lowbit.doctor.examine", interrupt)
    assert main(["doctor"]) == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, repeated",
    [
        ("eval M --text a b --json", "eval M --text a --text b --json"),
        ("quantize M -o O --calibration a b --text c", "quantize M -o O --calibration a --calibration b --text c"),
        ("eval --text a M", "eval --text a M"),
        ("eval M --text", "eval M --text"),
        ("generate M -- --text a b", "generate M -- --text a b"),
        ("generate M -", "generate M -"),
        ("", ""),
    ],
)
def test_several_files_behind_one_option(words, repeated):
    assert _repeat_file_options(words.split()) == repeated.split()


# ---- the commands ----


def test_quantize_json(capsys, model, text, tmp_path):
    report, progress = run_json(
        capsys,
        "quantize",
        model,
        "-o",
        tmp_path,
        "--group-size",
        32,
        "--bits",
        3,
        "--text",
        text,
        "--calibration",
        text,
        "--samples",
        3,
    )
    assert report["recipe"]["bits"] == 3
    assert report["calibration"] == {"source": str(text), "windows": 3, "context": 64, "tokens": 192}
    assert len(report["modules"]) == report["totals"]["modules"] == 15
    table = report["modules"].pop(0)  # head and embedding at once
    assert (table["name"], table["format"], table["method"]) == ("model.embed_tokens", "int8", "gptq")
    assert 0 < table["kl_divergence"] < 0.01 and f"KL {table['kl_divergence']:.2g} by itself" in progress
    assert {row["format"] for row in report["modules"]} == {"int3"}
    assert report["totals"]["bytes_after"] < report["totals"]["bytes_before"]
    assert report["kept"] == []
    figures = report["evaluation"]
    assert figures["context"] == 64 and figures["kl_divergence"] > 0
    assert figures["perplexity"] == pytest.approx(figures["reference_perplexity"], rel=0.2)
    report["modules"].insert(0, table)
    assert report == {**json.loads((tmp_path / "report.json").read_text()), "report": str(tmp_path / "report.html")}
    assert "model.layers.1.mlp.down_proj" in (tmp_path / "report.html").read_text("utf-8")
    for label in ("doctor", "plan", "text", "done"):
        assert re.search(f"^  {label} +", progress, re.MULTILINE)
    assert len(re.findall(r"^ +[01]  \S+_proj ", progress, re.MULTILINE)) == 14


def test_quantize_prints_for_people(capsys, model, tmp_path):
    out = tmp_path / "new" / "folder"
    assert main(["quantize", str(model), "-o", str(out), "--method", "rtn", "--no-report", "--asymmetric"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and not ANSI.search(captured.out)
    assert "rounded to nearest" in captured.out
    assert "15 of 15 matrices" in captured.out
    assert not (out / "report.html").exists() and not (out / "report.json").exists()
    assert (out / "model.safetensors").is_file() and (out / "tokenizer.json").is_file()


def test_quantize_calibrates_on_python_by_default_and_says_so(capsys, model, tmp_path):
    report, _ = run_json(
        capsys, "quantize", model, "-o", tmp_path, "--samples", 1, "--rule", r"model\.layers\.1.*=skip"
    )
    assert "Python's standard library" in report["calibration"]["source"]
    assert report["calibration"]["tokens"] == 64
    assert len(report["modules"]) == 8


def test_sensitivity_says_how_to_quantize_and_quantize_does_so(capsys, model, text, tmp_path):
    recipe, page = tmp_path / "recipe.json", tmp_path / "page.html"
    more = ["--calibration", text, "--samples", 9, "--formats", "trit,4:g32,16", "--group-size", 32]
    report, shown = run_json(
        capsys,
        "sensitivity",
        model,
        *more,
        "--budget",
        "8.2bits",
        "-o",
        recipe,
        "--plot",
        page,
        "--groups",
        "projections",
    )
    assert report["calibration"] == {"windows": 8, "context": 64, "tokens": 512}
    assert report["evaluation"] == {"windows": 1, "context": 64, "tokens": 64}
    assert len(report["modules"]) == 3 * 15 and len(report["groups"]) == 2 * 8
    choice = report["choice"]
    assert choice["bits_per_weight"] <= 8.2 and choice["kl_divergence"] > 0 and choice["windows"] == 1
    sizes = [point["bytes"] for point in report["pareto"]]
    assert sizes == sorted(sizes) and sizes[0] <= choice["bytes"] <= sizes[-1]
    for label in ("figures", "budget", "verified", "rules", "recipe", "plot"):
        assert re.search(f"^  {label} +", shown, re.MULTILINE)
    assert page.read_text("utf-8").count("<svg") == 2 and "self_attn.q_proj" in page.read_text("utf-8")

    outputs = []
    for name, arguments in (
        ("file", ["--recipe", recipe]),
        ("rules", ["--bits", 16, "--group-size", 32, *(word for rule in choice["rules"] for word in ("--rule", rule))]),
    ):
        made, _ = run_json(capsys, "quantize", model, "-o", tmp_path / name, "--calibration", text, *arguments)
        assert made["totals"]["bytes_after"] == choice["total_bytes"]
        outputs.append({row["name"]: (row["format"], row["group_size"]) for row in made["modules"]})
    assert outputs[0] == outputs[1] and outputs[0]


def test_sensitivity_prints_for_people(capsys, model, text, tmp_path):
    page = tmp_path / "page.html"
    words = ["--calibration", text, "--text", text, "--samples", 3, "--formats", "2,8", "--plot", page]
    assert main(list(map(str, ["sensitivity", model, *words]))) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and not ANSI.search(captured.out)
    assert re.search(r"^  name +2 +8$", captured.out, re.MULTILINE)
    assert len(re.findall(r"^  model\.\S+ +\S+ +\S+$", captured.out, re.MULTILINE)) == 15
    assert "measured on" in captured.out and "rules" not in captured.out
    assert page.read_text("utf-8").count("<svg") == 3  # one a format, and what bytes buy


def test_quantize_within_a_budget(capsys, model, text, tmp_path):
    more = ["--calibration", text, "--samples", 9, "--formats", "2,8,16", "--group-size", 32, "--text", text]
    rule = ["--rule", r".*\.1\.mlp\.up_proj$=4"]
    report, shown = run_json(capsys, "quantize", model, "-o", tmp_path, "--budget", "120kB", *more, *rule)
    assert report["totals"]["bytes_after"] == report["budget"]["total_bytes"] <= 120_000
    assert report["budget"]["kl_divergence"] > 0 and report["budget"]["windows"] == 1
    assert report["evaluation"]["kl_divergence"] > 0
    assert "model.layers.1.mlp.up_proj" not in report["budget"]["formats"]
    formats = {row["name"]: row["format"] for row in report["modules"]}
    assert formats["model.layers.1.mlp.up_proj"] == "int4"
    assert set(report["recipe"]["rules"]) >= {r".*\.1\.mlp\.up_proj$"}
    assert re.search("^  verified +KL ", shown, re.MULTILINE)


def test_the_embedding_from_the_head(capsys, model, tmp_path):
    """Refused for a model that was not trained so, unless the bound says otherwise, and then shown."""
    plain = transformers.AutoModelForCausalLM.from_pretrained(model)
    plain.config.tie_word_embeddings = False
    plain.lm_head.weight = torch.nn.Parameter(40 * torch.randn_like(plain.lm_head.weight))
    shutil.copytree(model, tmp_path / "untied")
    plain.save_pretrained(tmp_path / "untied")
    arguments = [
        "quantize",
        str(tmp_path / "untied"),
        "-o",
        str(tmp_path / "out"),
        "--embed",
        "from-head",
        "--samples",
        "2",
    ]
    assert main(arguments) == 2
    assert re.search(
        "model.embed_tokens: KL divergence with the table of lm_head: expected at most 0.1, got",
        capsys.readouterr().err,
    )
    assert main([*arguments, "--embed-bound", "inf"]) == 0
    assert re.search("^  embedding +the head's table; by itself that costs KL", capsys.readouterr().out, re.MULTILINE)
    facts, _ = run_json(capsys, "inspect", tmp_path / "out")
    tables = {module["name"]: module["shared_with"] for module in facts["modules"] if module["format"] == "int8"}
    assert tables == {"model.embed_tokens": None, "lm_head": "model.embed_tokens"}
    assert main([*arguments, "--embed", "tail", "--force"]) == 2
    assert "embed: expected own or from-head, got 'tail'" in capsys.readouterr().err


def test_force_replaces_a_quantized_model(capsys, model, tmp_path):
    for bits in (8, 2):
        arguments = ["--method", "rtn", "--bits", str(bits), "--embed-bits", "16", "--force"]
        assert main(["quantize", str(model), "-o", str(tmp_path), *arguments]) == 0
    capsys.readouterr()
    facts, _ = run_json(capsys, "inspect", tmp_path)
    assert {module["format"] for module in facts["modules"]} == {"int2", "float32"}


def test_inspect_a_quantized_model(capsys, quantized):
    facts, _ = run_json(capsys, "inspect", quantized, "--verify")
    modules = {module["name"]: module for module in facts["modules"]}
    assert facts["quant_method"] == "lowbit"
    assert "model.safetensors" in facts["verified_files"]
    query = modules["model.layers.0.self_attn.q_proj"]
    # 64 rows of one 64-byte line (128 codes wide) and two fp16 scales.
    assert query == {
        "name": "model.layers.0.self_attn.q_proj",
        "format": "int4",
        "shape": [64, 64],
        "group_size": 32,
        "bits_per_weight": 8 * 64 * (64 + 4) / (64 * 64),
        "bytes": 64 * (64 + 4),
        "scales": query["scales"],
        "zeros": False,
        "perm": False,
        "shared_with": None,
    }
    low, high = query["scales"]
    assert 0 < low < high < 1
    assert modules["lm_head"]["shared_with"] == "model.embed_tokens" and modules["lm_head"]["bytes"] == 0
    assert modules["model.embed_tokens"]["format"] == "int8"
    totals = facts["totals"]
    assert totals["formats"]["int4"]["modules"] == 14 and totals["formats"]["int8"]["modules"] == 1
    assert totals["bytes"] == sum(m["bytes"] for m in facts["modules"]) + totals["other_bytes"]
    names = [module["name"] for module in facts["modules"]]
    assert names.index("model.layers.0.mlp.up_proj") < names.index("model.layers.1.mlp.down_proj")


def test_inspect_for_people_and_one_file(capsys, quantized):
    assert main(["inspect", str(quantized / "model.safetensors")]) == 0
    out = capsys.readouterr().out
    assert not ANSI.search(out)
    assert re.search(r"model\.layers\.0\.self_attn\.q_proj +int4 +64×64 +32 +8\.50 +4\.4 kB", out)
    assert re.search(r"^  total +", out, re.MULTILINE)


def test_inspect_a_plain_model(capsys, model):
    facts, _ = run_json(capsys, "inspect", model)
    assert facts["quant_method"] is None
    assert {module["format"] for module in facts["modules"]} == {"float32"}
    assert facts["totals"]["bits_per_weight"] == 32
    assert facts["totals"]["other_tensors"] == 5  # norms


def test_inspect_finds_a_changed_file(capsys, model, tmp_path):
    assert main(["quantize", str(model), "-o", str(tmp_path), "--method", "rtn"]) == 0
    capsys.readouterr()
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    code, line = run_error(capsys, "inspect", tmp_path, "--verify")
    assert code == 2 and "model.safetensors" in line


@pytest.mark.parametrize("format, arguments", [("gptq", ()), ("gptq_v2", ("--asymmetric",))])
def test_gptq_files_can_be_written_inspected_and_evaluated(capsys, model, text, tmp_path, format, arguments):
    out = tmp_path / "out"
    settings = ["--method", "rtn", "--group-size", "32", "--format", format, *arguments]
    assert main(["quantize", str(model), "-o", str(out), *settings]) == 0
    capsys.readouterr()
    facts, _ = run_json(capsys, "inspect", out)
    query = next(m for m in facts["modules"] if m["name"].endswith("0.self_attn.q_proj"))
    assert (query["format"], query["shape"], query["group_size"], query["perm"]) == ("gptq int4", [64, 64], 32, False)
    figures, _ = run_json(capsys, "eval", out, "--against", model, "--text", text, "--max-windows", 2)
    assert 0 < figures["kl_divergence"] < 0.1


def test_eval_against_a_reference(capsys, model, quantized, text):
    figures, progress = run_json(
        capsys, "eval", quantized, "--against", model, "--text", text, "--context", 32, "--max-windows", 5
    )
    assert set(figures) >= {"perplexity", "reference_perplexity", "kl_divergence", "bytes", "context"}
    assert (figures["context"], figures["windows"], figures["tokens"]) == (32, 5, 5 * 31)
    assert 0 < figures["kl_divergence"] < 0.1 and 0 < figures["top1_agreement"] <= 1
    assert figures["bytes"] < figures["reference_bytes"]
    assert "5/5 windows" in progress


def test_eval_a_model_against_itself_in_another_dtype(capsys, quantized, text):
    arguments = ["--against", quantized, "--text", text, "--max-windows", 2, "--dtype", "bfloat16", "--threads", 1]
    figures, _ = run_json(capsys, "eval", quantized, *arguments)
    assert figures["kl_divergence"] == 0
    assert figures["perplexity"] == figures["reference_perplexity"]


def test_eval_for_people(capsys, model, quantized, text):
    for arguments, expected in [([], "perplexity "), (["--against", str(model)], "KL(reference || model)")]:
        assert main(["eval", str(quantized), "--text", str(text), "--max-windows", "1", *arguments]) == 0
        captured = capsys.readouterr()
        assert expected in captured.out and captured.err == ""


def test_eval_uses_python_source_by_default(capsys, model):
    figures, _ = run_json(capsys, "eval", model, "--max-windows", 1)
    assert "Python's standard library" in figures["text"]


def test_generate(capsys, model, quantized):
    arguments = ["def add", "--max-new-tokens", 12]
    first, _ = run_json(capsys, "generate", quantized, *arguments)
    assert first["new_tokens"] == 12 and first["prompt_tokens"] >= 2
    assert first["prefill_tokens_per_second"] > 0 and first["decode_tokens_per_second"] > 0
    assert main(["generate", str(quantized), *map(str, arguments)]) == 0
    captured = capsys.readouterr()
    assert captured.out == "def add" + first["text"] + "\n"
    assert "12 tokens at" in captured.err
    # The same tokens as the library's own greedy search.
    loaded = transformers.AutoModelForCausalLM.from_pretrained(quantized)
    tokenizer = transformers.AutoTokenizer.from_pretrained(quantized)
    ids = tokenizer("def add", return_tensors="pt")["input_ids"]
    tokens = loaded.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(tokens) == first["text"]


def test_generate_samples_by_seed(capsys, model):
    texts = [
        run_json(capsys, "generate", model, "for", "--max-new-tokens", 8, "--temperature", 1.5, "--seed", seed)[0][
            "text"
        ]
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_generate_reads_stdin_and_one_token(capsys, monkeypatch, model):
    monkeypatch.setattr("sys.stdin", io.StringIO("def "))
    result, _ = run_json(capsys, "generate", model, "-", "--max-new-tokens", 1)
    assert result["prompt"] == "def " and result["new_tokens"] == 1
    assert result["decode_tokens_per_second"] is None


def test_bench(capsys):
    arguments = ["bench", "--quick", "--shape", "256x1024", "--format", "int4", "--tokens", "2", "--json"]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    rows = [json.loads(line) for line in captured.out.splitlines()]
    assert [(row["verb"], row["case"]) for row in rows] == [
        ("matmul", "warm"), ("matmul", "dram"), ("gather", "warm"), ("gather", "dram"),
    ]  # fmt: skip
    for row in rows:
        assert row["kernel"].startswith(f"int4_{row['verb']}__")
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["microseconds"] * 1e-3)
        assert row["share"] == pytest.approx(row["gb_per_s"] / row["probe_gb_per_s"])
        assert row["busy"] == (row["probe_spread"] > 0.2 or row["contended_cpus"] > 0.1)
        assert row["microseconds_min"] <= row["microseconds"] <= row["microseconds_p90"]
    assert rows[0]["bytes"] == 256 * (512 + 8 * 2)
    assert rows[2]["bytes"] == 2 * (512 + 8 * 2) + 2 * 1024 * 4
    assert len(re.findall(r"int4_\w+__\w+", captured.err)) == 4


def test_bench_of_ternary_matrices_as_trits_and_as_int2(capsys):
    words = ["bench", "--quick", "--shape", "64x640", "--verb", "matmul", "--tokens", "1", "--json"]
    assert main([*words, "--format", "trit", "--format", "trit-int2"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["format"], row["case"]) for row in rows] == [
        ("trit", "warm"), ("trit", "dram"), ("trit-int2", "warm"), ("trit-int2", "dram"),
    ]  # fmt: skip
    assert [row["kernel"].partition("_")[0] for row in rows[::2]] == ["trit", "int2"]
    assert [row["bytes"] for row in rows[::2]] == [64 * 2 * 64 + 4, 64 * 3 * 64 + 4 + 1]
    assert {row["group_size"] for row in rows} == {640}


def test_a_terminal_gets_colour_and_a_bar(capsys, monkeypatch, model, text):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes any stream for a terminal
    monkeypatch.setenv("TERM", "xterm-256color")
    assert main(["eval", str(model), "--text", str(text), "--max-windows", "2"]) == 0
    out = capsys.readouterr().out
    assert ANSI.search(out)
    assert "2/2 windows" in out


def test_a_trained_model_stays_itself(capsys, tmp_path):
    report, _ = run_json(
        capsys, "quantize", CODE_MODEL, "-o", tmp_path, "--rule", "embed_tokens=8", "--samples", 8, "--context", 256
    )
    assert report["totals"]["bytes_after"] < 0.4 * report["totals"]["bytes_before"]
    figures, _ = run_json(capsys, "eval", tmp_path, "--against", CODE_MODEL, "--context", 256, "--max-windows", 8)
    assert figures["reference_perplexity"] < 40
    assert figures["kl_divergence"] < 0.1
    assert figures["perplexity"] < 1.1 * figures["reference_perplexity"]
