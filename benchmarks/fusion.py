"""Measure what early fusion of images costs inside model.onnx, and in a separate session.

    python benchmarks/fusion.py [--json FILE]

The script runs the random model of benchmarks/presets.py (0.43 B parameters, bf16, run in float32)
once without a vision tower and once with a small one. The two files model.onnx differ in early
fusion only. It also runs embedding and early fusion as a separate ONNX model, which a split
artefact would call before its decoder. All of them take turns in one process; the figures are
medians.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnxruntime
import torch
from presets import model
from rich.console import Console
from rich.table import Table

import moec
from moec.artefact.artefact import Artefact
from moec.exporters.onnx.write import lower_model, save_bound
from moec.graph_builder import ops
from moec.graph_builder.builder import Builder
from moec.spec.model import ModelSpec, Tokens
from moec.spec.parameters import text_parameters
from moec.spec.presets import PRESETS
from moec.spec.reduced import reduced
from moec.weights.random import write_random_checkpoint

ROUNDS, STEPS, PROMPT, IMAGE = 7, 16, 1024, 3


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    arguments.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    options = arguments.parse_args()
    vision = reduced(PRESETS["scout"]).vision
    assert vision is not None
    plain = model().model_copy(update={"tokens": Tokens(image=IMAGE)})
    with tempfile.TemporaryDirectory(prefix="moec-benchmark-") as name:
        folder, ways = Path(name), {}
        for label, spec in (
            ("without a tower", plain),
            ("fusion in model.onnx", plain.model_copy(update={"vision": vision})),
        ):
            write_random_checkpoint(spec, folder / label / "weights")
            built = moec.export(folder / label / "weights", out=folder / label / "artefact")
            ways[label] = whole_model(built)
        ways["separate embeddings, in addition"] = embeddings(built, folder)
        seconds: dict[tuple[str, str], list[float]] = {}
        for _ in range(ROUNDS):
            for label, way in ways.items():
                for kind, run in way.items():
                    seconds.setdefault((label, kind), []).append(run())
    medians = {key: statistics.median(each) for key, each in seconds.items()}
    table = Table()
    for head in ("", "decode step", f"prefill of {PROMPT} tokens"):
        table.add_column(head, justify="right" if head else "left")
    for label in ways:
        cells = (f"{1e3 * medians[label, kind]:.2f} ms" for kind in ("decode", "prefill"))
        table.add_row(label, *cells)
    Console().print(table)
    if options.json:
        rows = [{"model": label, "call": kind, "s": s} for (label, kind), s in medians.items()]
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


Way = dict[str, Callable[[], float]]


def whole_model(artefact: Artefact) -> Way:
    """Functions that time prefill and decode steps of text in a session."""
    session = moec.open_session(artefact.path)
    ids = torch.randint(4, 8000, (1, PROMPT))
    _, cache = session.prefill(ids, capacity=PROMPT + STEPS * (ROUNDS + 1))

    def prefill() -> float:
        start = time.perf_counter()
        session.prefill(ids)
        return time.perf_counter() - start

    def decode() -> float:
        start = time.perf_counter()
        for _ in range(STEPS):
            session.decode(torch.tensor([5]), cache)
        return (time.perf_counter() - start) / STEPS

    return {"prefill": prefill, "decode": decode}


def embeddings(artefact: Artefact, folder: Path) -> Way:
    """The same functions for embeddings with early fusion only."""
    spec = artefact.manifest.spec
    file = folder / "embed.onnx"
    lowered = lower_model(graph(spec), "standard", "embed")
    entries = {
        name: replace(entry, file=artefact.weights_folder / entry.file.name)
        for name, entry in artefact.entries().items()
    }
    save_bound(lowered, file, entries, artefact.weights_folder)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(artefact.weights_folder)
    )
    session = onnxruntime.InferenceSession(file, options)

    def run(tokens: int, calls: int) -> float:
        ids = torch.randint(4, 8000, (1, tokens)).numpy()
        start = time.perf_counter()
        for _ in range(calls):
            session.run(None, {"input_ids": ids})
        return (time.perf_counter() - start) / calls

    return {"prefill": lambda: run(PROMPT, 3), "decode": lambda: run(1, 200)}


def graph(spec: ModelSpec) -> torch.fx.GraphModule:
    """A graph from token ids to embeddings with early fusion."""
    b = Builder(text_parameters(spec), spec.stored)
    ids = b.input("input_ids", ("batch", "sequence"), torch.int64)
    x = b.emit(ops.embedding, ids, b.parameter("embed.weight"), "fp32", name="embed")
    none = torch.zeros(0, spec.text.dim)
    features = b.input("image_features", ("image_tokens", spec.text.dim), none.dtype, none)
    return b.output({"fused": b.emit(ops.fuse, x, ids, features, IMAGE, name="fused")})


if __name__ == "__main__":
    main()
