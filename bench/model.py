"""A whole model with random weights, end to end. python bench/model.py [--shape ternary-2.7b] [--help]

llama-1b: Llama-3.2-1B's shape, bf16 in torch against lowbit. ternary-2.7b: the size of MatMulFreeLM-2.7B (32 layers,
2.7 billion weights) with ternary linears and head and a 4-bit embedding, made of random trits; lowbit alone.

Measures decoding (tokens a second after a short prompt), prefill, resident memory and load time. The packed model is
made by lowbit.quantize (round to nearest), saved, and loaded again, as a user's would be; the dense one is saved and
loaded by transformers. Each runs in a process of its own; they take turns with the bandwidth probe between.

With LLAMA_BENCH=/path/to/llama-bench also llama.cpp (peers/llama_cpp.py): the same shape in Q4_0 with a Q8_0 table,
or in TQ1_0 and TQ2_0.

Subjects: "torch bf16" (transformers as it comes), "torch bf16 prepacked" (its linears reordered once for oneDNN, which
torch otherwise does at each call), and lowbit in both activation modes. The same random weights in all of them.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import harness
from matmul import median_probe
from peers import llama_cpp

SHAPES = {
    "llama-1b": {
        "num_hidden_layers": 16,
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
    "ternary-2.7b": {
        "num_hidden_layers": 32,
        "vocab_size": 32000,
        "hidden_size": 2560,
        "intermediate_size": 6912,
        "num_attention_heads": 20,
        "num_key_value_heads": 20,
        "head_dim": 128,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    },
}
SUBJECTS = {  # name: (process, mode)
    "torch bf16": ("dense", "plain"),
    "torch bf16 prepacked": ("prepacked", "plain"),
    "lowbit, float activations": ("packed", "float"),
    "lowbit, int8 activations": ("packed", "int8"),
}
BY_MODULES = {  # with --modules: decoder layers as Transformers runs them, not in one call
    f"{name}, by modules": (kind, f"{mode} modules") for name, (kind, mode) in SUBJECTS.items() if kind == "packed"
}


def memory() -> dict:
    """Megabytes of this process: resident, of those private to it (mapped files excluded), and the peak so far."""
    status = Path("/proc/self/status").read_text()

    def field(name: str) -> float:
        found = re.search(rf"^{name}:\s*(\d+) kB", status, re.MULTILINE)
        return round(int(found.group(1)) / 1024, 1) if found else 0.0

    return {"resident_mb": field("VmRSS"), "anonymous_mb": field("RssAnon"), "peak_mb": field("VmHWM")}


class Model:
    """The worker's side: one model and the questions about it."""

    def __init__(self, kind: str):
        import torch
        import transformers

        torch.manual_seed(0)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.kind, self.torch, self.transformers = kind, torch, transformers

    def describe(self) -> dict:
        versions = {"torch": self.torch.__version__, "transformers": self.transformers.__version__}
        if self.kind == "packed":
            import lowbit

            versions["lowbit"] = lowbit.__version__
        return versions

    def make_ternary(self, folder: str, shape: dict) -> dict:
        """Writes a packed model of random trits; its floats never exist, for they would take 5.4 GB."""
        import lowbit
        from lowbit import PackedMatrix
        from lowbit.models import find_targets, patch

        torch, start = self.torch, time.perf_counter()
        with torch.device("meta"):
            model = self.transformers.AutoModelForCausalLM.from_config(
                self.transformers.LlamaConfig(**shape), dtype=torch.bfloat16
            )
        for target in find_targets(model):
            rows, cols = target.shape
            if "embedding" in target.kinds:
                codes = torch.randint(0, 16, (rows, cols), dtype=torch.uint8)
                scales = torch.full((rows, -(-cols // 128)), 0.01, dtype=torch.float16)
                packed = PackedMatrix.from_codes(codes, scales, format="int4", group_size=128)
            else:
                codes = torch.randint(0, 3, (rows, cols), dtype=torch.uint8)
                packed = PackedMatrix.from_codes(codes, torch.full((1, 1), cols**-0.5), format="trit")
            patch(model, dict.fromkeys(target.names, packed))
        for module in model.modules():  # the norms
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(torch.ones(parameter.shape, dtype=torch.bfloat16)))
        lowbit.save(model, f"{folder}/packed")
        sizes = {"packed": sum(f.stat().st_size for f in Path(folder, "packed").glob("*.safetensors"))}
        return {"disk_bytes": sizes, "quantize_seconds": time.perf_counter() - start}

    def make(self, folder: str, shape: dict, bits: int, head_bits: int) -> dict:
        """Writes the dense and the packed model under `folder`; returns their bytes on disk."""
        import lowbit

        config = self.transformers.LlamaConfig(**shape)
        with self.torch.device("cpu"):
            model = self.transformers.AutoModelForCausalLM.from_config(config, dtype=self.torch.bfloat16).eval()
        model.save_pretrained(f"{folder}/dense")
        recipe = lowbit.Recipe(bits=bits, group_size=128, method="rtn", head_bits=head_bits, embed_bits=head_bits)
        start = time.perf_counter()
        lowbit.quantize(model, recipe=recipe)
        seconds = time.perf_counter() - start
        lowbit.save(model, f"{folder}/packed")
        sizes = {
            kind: sum(f.stat().st_size for f in Path(folder, kind).glob("*.safetensors"))
            for kind in ("dense", "packed")
        }
        return {"disk_bytes": sizes, "quantize_seconds": seconds}

    def load(self, folder: str) -> dict:
        """Loads the model of this process. The files have just been written, so they come from the page cache."""
        start = time.perf_counter()
        if self.kind == "packed":
            import lowbit

            self.model = lowbit.load(f"{folder}/packed")
        else:
            path = f"{folder}/dense"
            load = self.transformers.AutoModelForCausalLM.from_pretrained
            self.model = load(path, dtype=self.torch.bfloat16).eval()
        seconds = time.perf_counter() - start
        if self.kind == "prepacked":
            self._prepack()
        return {"load_seconds": seconds, "token_bytes": self._token_bytes(), **memory()}

    def _prepack(self) -> None:
        torch = self.torch

        class Prepacked(torch.nn.Module):
            def __init__(self, linear):
                super().__init__()
                self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
                self.rows = linear.out_features

            def forward(self, x):
                y = torch.ops.mkldnn._linear_pointwise(x.reshape(-1, x.shape[-1]), self.packed, None, "none", [], "")
                return y.view(*x.shape[:-1], self.rows)

        for name, module in list(self.model.named_modules()):
            if isinstance(module, torch.nn.Linear):
                parent, _, attribute = name.rpartition(".")
                setattr(self.model.get_submodule(parent), attribute, Prepacked(module))

    def _token_bytes(self) -> int:
        """Bytes of weights that one token reads: all but the embedding, whose table counts as the head if tied."""
        if self.kind != "packed":
            config = self.model.config
            attention = (
                config.hidden_size * config.head_dim * 2 * (config.num_attention_heads + config.num_key_value_heads)
            )
            layer = attention + 3 * config.hidden_size * config.intermediate_size
            return 2 * (config.num_hidden_layers * layer + config.vocab_size * config.hidden_size)
        from lowbit.nn import Linear

        return sum(m.packed.nbytes for m in self.model.modules() if isinstance(m, Linear))

    def _mode(self, mode: str) -> None:
        if self.kind == "packed":
            from lowbit.models import fuse
            from lowbit.nn import Linear

            activations, _, way = mode.partition(" ")
            fuse(self.model, enabled=way != "modules")
            for module in self.model.modules():
                if isinstance(module, Linear):
                    module.activations = activations
            with self.torch.inference_mode():
                self.model(self.torch.zeros(1, 2, dtype=self.torch.long))  # looks at what changed: not to be measured

    def decode(self, mode: str, prompt: int, tokens: int) -> list[float]:
        """Seconds of each of `tokens` greedy steps after a prompt."""
        torch = self.torch
        self._mode(mode)
        taken = []
        with torch.inference_mode():
            ids = torch.randint(0, self.model.config.vocab_size, (1, prompt))
            result = self.model(ids, use_cache=True, logits_to_keep=1)
            for _ in range(tokens):
                ids = result.logits[:, -1:].argmax(-1)
                start = time.perf_counter()
                result = self.model(ids, past_key_values=result.past_key_values, use_cache=True, logits_to_keep=1)
                taken.append(time.perf_counter() - start)
        return taken

    def prefill(self, mode: str, prompt: int) -> list[float]:
        """Seconds of one pass over `prompt` tokens."""
        torch = self.torch
        self._mode(mode)
        with torch.inference_mode():
            ids = torch.randint(0, self.model.config.vocab_size, (1, prompt))
            start = time.perf_counter()
            self.model(ids, use_cache=True, logits_to_keep=1)
            return [time.perf_counter() - start]

    def memory(self) -> dict:
        return memory()


def start(kind: str, threads: int) -> harness.Worker:
    command = [sys.executable, os.path.abspath(__file__), "--worker", kind, "--threads", str(threads)]
    return harness.Worker(command, threads)


def start_llama_cpp(options: argparse.Namespace, folder: str, shape: dict) -> tuple[dict, dict, dict, str]:
    """(workers, what they loaded, {"llama.cpp": version}, why there are none) of llama.cpp, by the names of its
    subjects."""
    workers, loaded, versions = {}, {}, {}
    for name in llama_cpp.KINDS[options.shape]:
        worker = start("llama_cpp", options.threads)
        try:
            worker.ask("describe")
            loaded[name] = worker.ask("make", folder=folder, shape=shape, kind=options.shape, name=name)
        except harness.WorkerError as failure:
            worker.close()
            return workers, loaded, versions, str(failure)
        workers[name] = worker
        versions["llama.cpp"] = loaded[name].pop("version")
        print(f"{name}: {loaded[name]}", flush=True)
    return workers, loaded, versions, ""


def report(row: dict) -> str:
    where = f"{row['subject']:<28} {row['what']:<8} {row['tokens']:>4} tokens"
    if "failure" in row:
        return f"{where} failed: {row['failure']}"
    busy = "" if row["quiet"] else "  (busy)"
    return (
        f"{where} {row['tokens_per_second']:>8.1f} tokens/s  {row['gbps']:6.2f} GB/s of {row['probe_gbps']:5.1f}{busy}"
    )


def measure(options: argparse.Namespace, workers: dict, loaded: dict) -> list[dict]:
    ours_and_torch = SUBJECTS | BY_MODULES if options.modules else SUBJECTS
    subjects = {name: how for name, how in ours_and_torch.items() if how[0] in workers}
    subjects |= {name: (name, "") for name in workers if name in llama_cpp.KINDS[options.shape]}
    cases = [("decode", options.new_tokens, {"prompt": options.prompt, "tokens": options.new_tokens})]
    cases += [("prefill", prompt, {"prompt": prompt}) for prompt in options.prefill]
    rows = []
    for what, tokens, details in cases:
        slices = {}
        for subject, (kind, mode) in subjects.items():
            slices[subject] = (workers[kind], partial(workers[kind].ask, what, mode=mode, **details))
        for _worker, run in slices.values():
            run()  # choose kernels, fault pages in
        rounds = harness.alternate(slices, options.rounds, partial(harness.read_bandwidth, options.threads))
        for subject, (kind, _) in subjects.items():
            failed = "failure" in rounds[subject][0]
            figures = rounds[subject][0] if failed else harness.summarise(rounds[subject], loaded[kind]["token_bytes"])
            row = {"subject": subject, "ours": kind == "packed", "what": what, "tokens": tokens, **figures}
            if not failed:
                row["tokens_per_second"] = (tokens if what == "prefill" else 1) / row["us"] * 1e6
                row |= {key: loaded[kind][key] for key in ("load_seconds", "disk_bytes")}
                row |= workers[kind].ask("memory")
            rows.append(row)
            print(report(row), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-1b")
    parser.add_argument("--layers", type=int, help="of the model; fewer for a quick look")
    parser.add_argument("--bits", type=int, default=4, choices=(2, 3, 4, 8), help="of the linear layers, group 128")
    parser.add_argument("--head-bits", type=int, default=8, choices=(4, 8), help="of the tied embedding and head")
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--prefill", nargs="+", type=int, default=[128, 512])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--modules", action="store_true", help="lowbit also with Transformers' way through its layers")
    parser.add_argument("--output", help="default: results/<machine>/model.json")
    parser.add_argument("--worker", choices=("dense", "prepacked", "packed", "llama_cpp"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker == "llama_cpp":
        peer = llama_cpp.LlamaCpp(options.threads)
        harness.serve(
            {question: getattr(peer, question) for question in ("describe", "make", "decode", "prefill", "memory")}
        )
        return
    if options.worker:
        model = Model(options.worker)
        questions = ("describe", "make", "make_ternary", "load", "decode", "prefill", "memory")
        harness.serve({question: getattr(model, question) for question in questions})
        return

    shape = dict(SHAPES[options.shape])
    shape["num_hidden_layers"] = options.layers = options.layers or shape["num_hidden_layers"]
    ternary = options.shape == "ternary-2.7b"
    name = "model_ternary" if ternary else "model"
    versions: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        with start("packed", options.threads) as maker:  # its memory is given back before anything is measured
            if ternary:
                made = maker.ask("make_ternary", folder=folder, shape=shape)
            else:
                made = maker.ask("make", folder=folder, shape=shape, bits=options.bits, head_bits=options.head_bits)
        print(f"made in {made['quantize_seconds']:.1f} s; on disk {made['disk_bytes']}", flush=True)
        kinds = ("packed",) if ternary else ("dense", "prepacked", "packed")
        workers = {kind: start(kind, options.threads) for kind in kinds}
        try:
            loaded = {}
            for kind, worker in workers.items():
                versions |= worker.ask("describe")
                loaded[kind] = worker.ask("load", folder=folder)
                loaded[kind]["disk_bytes"] = made["disk_bytes"]["packed" if kind == "packed" else "dense"]
                print(f"{kind}: {loaded[kind]}", flush=True)
            peers, peers_loaded, peers_versions, missing = start_llama_cpp(options, folder, shape)
            workers, loaded, versions = workers | peers, loaded | peers_loaded, versions | peers_versions
            probe = partial(harness.read_bandwidth, options.threads)
            ends = {"start": median_probe(probe)}
            rows = measure(options, workers, loaded)
            ends["end"] = median_probe(probe)
        finally:
            for worker in workers.values():
                worker.close()
    names = ("shape", "layers", "prompt", "new_tokens", "threads", "rounds")
    settings = {**{field: getattr(options, field) for field in names}, "quantize_seconds": made["quantize_seconds"]}
    absent = {"llama.cpp": missing} if missing else {}
    if not ternary:
        settings |= {"bits": options.bits, "head_bits": options.head_bits}
    print(harness.save(harness.document(name, settings, versions, absent, rows, ends), options.output))


if __name__ == "__main__":
    main()
