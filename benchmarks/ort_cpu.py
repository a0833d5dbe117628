"""Compare target ort on a CPU with transformers and llama.cpp: speed, memory and time to open.

    python benchmarks/ort_cpu.py [--model scout|olmoe] [--precisions fp32,int8,int4] [--layers N]
        [--rounds 5] [--json FILE]

The script writes a seeded random model in float32 to a temporary folder: one like Scout of 0.94 B
parameters (8 layers of width 1024, 16 experts of width 2048; 3.8 GB), or one like OLMoE of 1.01 B
(9 layers of width 1024, 64 experts of width 512, 8 a token; 4.0 GB). Each engine runs in its own
process. The engines take turns, so that their ratios hold on a shared machine too. "bandwidth" is
the share of the bandwidth of a large sum in the same run that a token's bytes reach. llama.cpp
takes part if llama-cpp-python and gguf are installed. Its q4_0 stores attention in 4 bits, our int4
in 8.

For the model like OLMoE, each `experts_implementation` of transformers that runs on a CPU is timed
alone first, and the fastest at decoding takes part. Each holds its own copy of the weights, and all
of them at once would not fit into 24 GB.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
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
from moec.runtime.bench.transformers import ENGINES, Transformers
from moec.spec.model import ModelSpec, Tokens
from moec.spec.presets import PRESETS
from moec.weights.random import write_random_checkpoint

PROMPT, NEW = 256, 32
#: our precisions, and llama.cpp's types of as many bits
PEERS = {"fp32": "f32", "int8": "q8_0", "int4": "q4_0"}


#: values of transformers' `experts_implementation`: the one that decodes, and the one for a prompt.
#: batched_mm gathers the weights of every token: 13 GB for a prompt of 256.
EXPERTS = {"eager": "eager", "grouped_mm": "grouped_mm", "batched_mm": "grouped_mm"}
FASTEST = "transformers, fastest experts"


@dataclass(frozen=True, slots=True)
class Model:
    """A preset and the sizes that make a model of 1 B parameters of it; its peers and goals.

    `decode` holds goals for tokens per second: of our `precision` over an engine. `prefill` holds
    the goal for the time to the first token in float32 over every engine of transformers.
    """

    preset: str
    sizes: dict[str, int]
    experts: dict[str, int]
    peers: tuple[str, ...]
    decode: tuple[tuple[str, str, float], ...]
    prefill: float | None = None

    def spec(self, layers: int | None) -> ModelSpec:
        """The model, with another number of layers if given."""
        row = PRESETS[self.preset]
        assert row.text.experts is not None
        experts = row.text.experts.model_copy(update=self.experts)
        sizes = self.sizes | ({"layers": layers} if layers else {})
        changes = {
            "name": "random-1b",
            "provenance": "custom",
            "dtype": "fp32",
            "vision": None,
            "tokens": Tokens(bos=0, eos=(1,), pad=2),
            "text": row.text.model_copy(update={**sizes, "experts": experts}),
        }
        return row.model_copy(update=changes)


_OURS = "onnxruntime lean fp32"
MODELS = {
    "scout": Model(
        "scout",
        {"layers": 8, "dim": 1024, "heads": 16, "kv_heads": 4, "head_dim": 64, "vocab": 32000},
        {"hidden": 2048, "shared_hidden": 2048},
        ENGINES,
        (
            *(("fp32", f"{peer} fp32", 5) for peer in ENGINES),
            ("int8", _OURS, 2.5),
            ("int4", _OURS, 3.5),
            *((precision, f"llama.cpp {precision}", 1) for precision in PEERS),
        ),
        prefill=4,
    ),
    "olmoe": Model(
        "olmoe-1b-7b",
        {"layers": 9, "dim": 1024, "heads": 16, "kv_heads": 16, "head_dim": 64, "vocab": 32000},
        {"hidden": 512},
        (FASTEST,),
        (
            ("fp32", f"{FASTEST} fp32", 1),
            ("int8", f"{FASTEST} fp32", 3),
            ("int4", f"{FASTEST} fp32", 3),
            ("fp32", "llama.cpp fp32", 0.85),
            ("int8", "llama.cpp int8", 0.9),
            ("int4", "llama.cpp int4", 0.85),
        ),
    ),
}


class _Experts:
    """transformers with an `experts_implementation` for decoding, and one for prompts."""

    def __init__(self, engine: Transformers, name: str) -> None:
        self._engine, self._name = engine, name

    def prefill(self, ids: Tensor, *, capacity: int) -> tuple[Tensor, Any]:
        self._engine.model.set_experts_implementation(EXPERTS[self._name])
        found = self._engine.prefill(ids, capacity=capacity)
        self._engine.model.set_experts_implementation(self._name)
        return found

    def decode(self, tokens: Tensor, cache: Any) -> Tensor:
        return self._engine.decode(tokens, cache)


class _Llama:
    """llama.cpp with the interface of an engine for `race`."""

    def __init__(self, path: Path) -> None:
        self._model = LlamaCpp(path, threads=torch.get_num_threads(), context=PROMPT + NEW)

    def prefill(self, ids: Tensor, *, capacity: int) -> tuple[Tensor, Any]:
        return torch.from_numpy(self._model.prefill(ids[0].tolist()))[None], None

    def decode(self, tokens: Tensor, cache: Any) -> Tensor:
        return torch.from_numpy(self._model.decode(int(tokens[0])))[None]


def open_engine(lane: Lane) -> Engine:
    """Open an engine of moec, transformers, or llama.cpp on the GGUF file beside the artefact.

    An engine called "transformers, NAME" with a NAME of `EXPERTS` is transformers with it.
    """
    name = lane.engine.removeprefix("transformers, ")
    if name in EXPERTS:
        opened = open_lane(replace(lane, engine=ENGINES[0]))
        assert isinstance(opened, Transformers)
        return _Experts(opened, name)
    if lane.engine == "llama.cpp":
        return _Llama(Path(lane.path).with_suffix(".gguf"))
    return open_lane(lane)


def fastest_experts(path: Path) -> str:
    """The engine of `EXPERTS` that decodes fastest, each timed alone."""
    rates = {}
    for name in EXPERTS:
        lane = Lane(str(path), f"transformers, {name}")
        (row,) = race([lane], 1, PROMPT, NEW, 2, open_engine)
        if row.error:
            print(f"{lane.engine}: {row.error}")
            continue
        rates[lane.engine] = row.decode_tokens_per_s
        print(f"{lane.engine}, alone: {row.decode_tokens_per_s:.1f} tokens/s", flush=True)
    if not rates:
        raise SystemExit("no experts_implementation of transformers runs")
    return max(rates, key=lambda engine: rates[engine])


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
    arguments.add_argument("--model", choices=MODELS, default="scout")
    arguments.add_argument("--precisions", default=",".join(PEERS), help="with fp32 among them")
    arguments.add_argument("--layers", type=int, help="fewer layers, for a quick try")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--json", type=Path)
    options = arguments.parse_args()
    precisions = options.precisions.split(",")
    if not {"fp32"} <= set(precisions) <= set(PEERS):
        arguments.error(f"--precisions: some of {', '.join(PEERS)}, with fp32 among them")
    model = MODELS[options.model]
    llama = find_spec("llama_cpp") and find_spec("gguf")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _in_process(write_random_checkpoint, model.spec(options.layers), folder / "weights")
        lanes = []
        for precision in precisions:
            kind = PEERS[precision]
            out = folder / precision
            print(f"{precision}: {_in_process(build, folder / 'weights', out)}", flush=True)
            presets = ("lean", "fast") if precision == "fp32" else ("lean",)
            lanes += [Lane(str(out), "onnxruntime", preset) for preset in presets]
            if llama:
                _in_process(write_gguf, folder / "weights", out.with_suffix(".gguf"), kind)
                lanes.append(Lane(str(out), "llama.cpp"))
        found = {FASTEST: fastest_experts(folder / "fp32")} if FASTEST in model.peers else {}
        lanes += [Lane(str(folder / "fp32"), found.get(peer, peer)) for peer in model.peers]
        rows = race(lanes, 1, PROMPT, NEW, options.rounds, open_engine)
    names = {engine: peer for peer, engine in found.items()}
    rows = [replace(row, engine=names.get(row.engine, row.engine)) for row in rows]
    _show(rows, model)
    if options.json:
        options.json.write_text(json.dumps([row.to_dict() for row in rows], indent=1))


def _show(rows: list[Timing], model: Model) -> None:
    """Print a table, and the ratios of our figures to those of the peers."""
    by_name = {f"{row.engine} {row.preset} {row.precision}".replace("  ", " "): row for row in rows}
    base = by_name[f"{model.peers[0]} fp32"]
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
    rate = {name: row.decode_tokens_per_s for name, row in by_name.items()}
    goals = [
        (
            f"{precision} decode over {peer}",
            rate[f"onnxruntime lean {precision}"] / rate[peer],
            goal,
        )
        for precision, peer, goal in model.decode
        if {peer, f"onnxruntime lean {precision}"} <= set(rate)  # there may be no llama.cpp
    ]
    if model.prefill:
        first = by_name[_OURS].first_token_s
        for peer in model.peers:
            ratio = by_name[f"{peer} fp32"].first_token_s / first
            goals.append((f"prefill over {peer}", ratio, model.prefill))
    for name, found, goal in goals:
        print(f"{name}: {found:.2f} (goal {goal})")


if __name__ == "__main__":
    main()
