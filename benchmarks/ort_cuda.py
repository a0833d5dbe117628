"""Compare ONNX Runtime on a GPU with transformers, eager and compiled: decoding at Scout's widths.

    python benchmarks/ort_cuda.py [--layers 4] [--json FILE]

The script writes a seeded random model of Scout's widths and full vocabulary to a temporary folder,
and packs it for target ort. 4 layers have 10.9 B parameters, which are 22 GB in bf16. Each engine
runs in its own process and has the GPU to itself. The script compares its logits with those of
transformers in float32. Times are for a step of the whole batch after prompts of 32 tokens. The
bound is the time to read what the step needs, at the bandwidth of a large copy in the same run.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fresh_process import call
from rich.console import Console
from rich.table import Table

import moec
from moec.runtime.bench.transformers import ENGINES, open_transformers
from moec.runtime.open import open_session
from moec.spec.model import ModelSpec
from moec.spec.presets import PRESETS
from moec.weights.random import write_random_checkpoint

BATCHES = (1, 8, 64)
PROMPT, STEPS = 32, 24


def model(layers: int) -> ModelSpec:
    """Scout with fewer layers."""
    scout = PRESETS["scout"]
    text = scout.text.model_copy(update={"layers": layers})
    changes = {"name": f"scout-{layers}-layers", "provenance": "custom", "vision": None}
    return scout.model_copy(update={**changes, "text": text})


def build(folder: Path, layers: int) -> dict[str, Any]:
    """Write weights and an artefact to `folder`; return the figures of the build."""
    start = time.perf_counter()
    write_random_checkpoint(model(layers), folder / "weights", device="cuda")
    drawn = time.perf_counter()
    art = moec.export(folder / "weights", target="ort", precision="bf16", out=folder / "art")
    packed = art.manifest.build
    return {
        "parameters_written_s": drawn - start,
        "packed_s": time.perf_counter() - drawn,
        "packed_bytes": packed.bytes_packed,
        "peak_bytes": packed.peak_bytes,
    }


def ours(folder: Path) -> dict[str, Any]:
    """Time ONNX Runtime on CUDA."""
    start = time.perf_counter()
    session = open_session(folder / "art", device="cuda")
    return {"open_s": time.perf_counter() - start, **_batches(session)}


def theirs(folder: Path, engine: str) -> dict[str, Any]:
    """Time transformers, eager or compiled."""
    start = time.perf_counter()
    peer = open_transformers(folder / "weights", engine, "bf16", "cuda")
    return {"open_s": time.perf_counter() - start, **_batches(peer)}


def _batches(engine: Any) -> dict[str, Any]:
    """The median milliseconds of a decode step for each batch, after steps that warm up."""
    vocab = PRESETS["scout"].text.vocab
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Any] = {"logits": _logits(engine)}
    for batch in BATCHES:
        ids = torch.randint(0, vocab, (batch, PROMPT), generator=generator)
        logits, cache = engine.prefill(ids, capacity=PROMPT + STEPS)
        tokens, times = logits.argmax(-1), []
        for _ in range(STEPS):
            start = time.perf_counter()
            tokens = engine.decode(tokens, cache).argmax(-1)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        found[str(batch)] = 1e3 * sorted(times[8:])[len(times[8:]) // 2]
    return found


def _logits(engine: Any) -> Any:
    """The logits of the first and the last of a few fixed steps, as numpy [2, 8, vocab]."""
    vocab = PRESETS["scout"].text.vocab
    ids = torch.randint(0, vocab, (8, PROMPT), generator=torch.Generator().manual_seed(1))
    first, cache = engine.prefill(ids[:, :-4], capacity=PROMPT)
    for column in ids[:, -4:].T:
        last = engine.decode(column, cache)
    return torch.stack([first.float().cpu(), last.float().cpu()]).numpy()


def reference(folder: Path) -> Any:
    """The same logits from transformers in float32."""
    return _logits(open_transformers(folder / "weights", ENGINES[0], "fp32", "cuda"))


def bandwidth() -> float:
    """The bytes per second that a large copy on the GPU reads and writes."""
    numbers = torch.zeros(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(numbers)
    best = float("inf")
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(numbers)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * numbers.numel() / best


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--layers", type=int, default=4)
    arguments.add_argument("--json", type=Path)
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = call(build, folder, options.layers)
        print("build:", made.value or made.error, flush=True)
        rows = {"moec, ONNX Runtime": call(ours, folder)}
        print("moec", rows["moec, ONNX Runtime"].error, flush=True)
        for engine in ENGINES:
            rows[engine] = call(theirs, folder, engine)
            print(engine, rows[engine].error, flush=True)
        exact = call(reference, folder)
        rate = call(bandwidth).value
    spec = model(options.layers)
    needed = {
        b: moec.plan(spec, "bf16", context=PROMPT + STEPS, batch=b).decode_read_bytes
        for b in BATCHES
    }
    table = Table(title=f"{spec.name}, bf16, ms a decode step; copy {rate / 1e12:.2f} TB/s")
    for column in ("engine", "open", *(f"batch {b}" for b in BATCHES)):
        table.add_column(column, justify="right" if column != "engine" else "left")
    bound = [f"{1e3 * needed[b] / rate:.2f}" for b in BATCHES]
    table.add_row("bound: bytes to read", "", *bound)
    for engine, row in rows.items():
        if row.error:
            table.add_row(engine, row.error)
            continue
        steps = [f"{row.value[str(b)]:.2f}" for b in BATCHES]
        table.add_row(engine, f"{row.value['open_s']:.1f} s", *steps)
    Console(width=110).print(table)
    for engine, row in rows.items():
        if row.value and exact.value is not None:
            off = np.linalg.norm(row.value["logits"] - exact.value) / np.linalg.norm(exact.value)
            print(f"{engine}: relative error of the logits {off:.1e}, to transformers in float32")
    if options.json:
        found = {engine: row.value or row.error for engine, row in rows.items()}
        for row in rows.values():
            (row.value or {}).pop("logits", None)
        options.json.write_text(json.dumps({"device": torch.cuda.get_device_name(), **found}))


if __name__ == "__main__":
    main()
