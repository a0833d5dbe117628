"""Compare target ort on a CPU with transformers and llama.cpp: speed, memory and time to open.

    python benchmarks/ort_cpu.py [--rounds 5] [--json FILE]

The script writes a seeded random model of 0.94 B parameters (8 layers of width 1024, 16 experts of
width 2048; float32, 3.8 GB) to a temporary folder. Each engine runs in its own process. The engines
take turns, so that their ratios hold on a shared machine too. "bandwidth" is the share of the
bandwidth of a large sum in the same run that a token's bytes reach. llama.cpp takes part if
llama-cpp-python and gguf are installed. Its q4_0 stores attention in 4 bits, our int4 in 8.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from fresh_process import call
from llamacpp_peer import LlamaCpp, write_gguf
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

import moec
from moec.cli.tables import size
from moec.runtime.bench.bench import Engine, Lane, Timing, open_lane, race
from moec.runtime.bench.transformers import ENGINES
from moec.spec.model import ModelSpec, Tokens
from moec.spec.presets import PRESETS
from moec.weights.random import write_random_checkpoint

PROMPT, NEW = 256, 32
#: our precisions, and llama.cpp's types of as many bits
PEERS = {"fp32": "f32", "int8": "q8_0", "int4": "q4_0"}


def model() -> ModelSpec:
    """A model like Scout, with 8 layers of width 1024 and 16 experts of width 2048."""
    scout = PRESETS["scout"]
    experts = scout.text.experts.model_copy(update={"hidden": 2048, "shared_hidden": 2048})
    sizes = {"layers": 8, "dim": 1024, "heads": 16, "kv_heads": 4, "head_dim": 64, "vocab": 32000}
    changes = {
        "name": "random-1b",
        "provenance": "custom",
        "dtype": "fp32",
        "vision": None,
        "tokens": Tokens(bos=0, eos=(1,), pad=2),
        "text": scout.text.model_copy(update={**sizes, "experts": experts}),
    }
    return scout.model_copy(update=changes)


class _Llama:
    """llama.cpp with the interface of an engine for `race`."""

    def __init__(self, path: Path) -> None:
        self._model = LlamaCpp(path, threads=torch.get_num_threads(), context=PROMPT + NEW)

    def prefill(self, ids: Tensor, *, capacity: int) -> tuple[Tensor, Any]:
        return torch.from_numpy(self._model.prefill(ids[0].tolist()))[None], None

    def decode(self, tokens: Tensor, cache: Any) -> Tensor:
        return torch.from_numpy(self._model.decode(int(tokens[0])))[None]


def open_engine(lane: Lane) -> Engine:
    """Open an engine of moec, or llama.cpp on the GGUF file beside the artefact."""
    if lane.engine != "llama.cpp":
        return open_lane(lane)
    return _Llama(Path(lane.path).with_suffix(".gguf"))


def build(weights: Path, out: Path) -> str:
    """An artefact in the precision that `out` is called, proven; what to say of it."""
    art = moec.export(weights, target="ort", precision=out.name, out=out)
    report = moec.validate(out, tokens=24)
    made = art.manifest.build
    verdict = "PASSED" if report.passed else f"FAILED at {report.first_divergence}"
    return (
        f"built in {sum(made.seconds.values()):.1f} s, {size(made.bytes_packed)} rewritten, "
        f"parity with the eager reference {verdict}"
    )


def _in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call `function` in its own process, whose memory is freed when it ends."""
    outcome = call(function, *arguments)
    if outcome.error:
        raise SystemExit(f"{function.__name__}: {outcome.error}")
    return outcome.value


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--json", type=Path)
    options = arguments.parse_args()
    llama = find_spec("llama_cpp") and find_spec("gguf")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _in_process(write_random_checkpoint, model(), folder / "weights")
        lanes = []
        for precision, kind in PEERS.items():
            out = folder / precision
            print(f"{precision}: {_in_process(build, folder / 'weights', out)}", flush=True)
            presets = ("lean", "fast") if precision == "fp32" else ("lean",)
            lanes += [Lane(str(out), "onnxruntime", preset) for preset in presets]
            if llama:
                _in_process(write_gguf, folder / "weights", out.with_suffix(".gguf"), kind)
                lanes.append(Lane(str(out), "llama.cpp"))
        lanes += [Lane(str(folder / "fp32"), peer) for peer in ENGINES]
        rows = race(lanes, 1, PROMPT, NEW, options.rounds, open_engine)
    _show(rows)
    if options.json:
        options.json.write_text(json.dumps([row.to_dict() for row in rows], indent=1))


def _show(rows: list[Timing]) -> None:
    """Print a table, and the ratios of our figures to those of the peers."""
    by_name = {f"{row.engine} {row.preset} {row.precision}".replace("  ", " "): row for row in rows}
    base = by_name[f"{ENGINES[0]} fp32"]
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    columns = (
        "engine", "opens in", f"first of {PROMPT}", "tokens/s", "x", "bandwidth", "own", "peak",
        "peak / weights",
    )  # fmt: skip
    for column in columns:
        table.add_column(column, justify="left" if column == "engine" else "right")
    for name, row in by_name.items():
        if row.error:
            print(f"{name}: {row.error}")
            continue
        table.add_row(
            name, f"{row.open_s:.2f} s", f"{1e3 * row.first_token_s:.0f} ms",
            f"{row.decode_tokens_per_s:.1f}",
            f"{row.decode_tokens_per_s / base.decode_tokens_per_s:.2f}",
            f"{100 * (row.bandwidth_share or 0):.0f} %", size(row.anonymous_bytes),
            size(row.peak_bytes), f"{row.peak_bytes / row.weights_bytes:.2f}",
        )  # fmt: skip
    Console(width=120).print(table)
    lean = by_name["onnxruntime lean fp32"]
    rate = {name: row.decode_tokens_per_s for name, row in by_name.items()}
    goals = [
        *((f"decode over {p}", lean.decode_tokens_per_s / rate[f"{p} fp32"], 5) for p in ENGINES),
        *((f"prefill over {p}", by_name[f"{p} fp32"].first_token_s / lean.first_token_s, 4)
          for p in ENGINES),
        *((f"{p} decode over fp32", rate[f"onnxruntime lean {p}"] / lean.decode_tokens_per_s, goal)
          for p, goal in (("int8", 2.5), ("int4", 3.5))),
    ]  # fmt: skip
    for precision in PEERS:
        if f"llama.cpp {precision}" in rate:
            ratio = rate[f"onnxruntime lean {precision}"] / rate[f"llama.cpp {precision}"]
            goals.append((f"{precision} decode over llama.cpp", ratio, 1))
    for name, found, goal in goals:
        print(f"{name}: {found:.2f} (goal {goal})")


if __name__ == "__main__":
    main()
