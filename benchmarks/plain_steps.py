"""Time a model that runs as a plain program of target torch on one GPU.

    python benchmarks/plain_steps.py [--preset qwen3-30b-a3b] [--precision fp8] [--layers N]

The decoder has the sizes of a preset, or so many of its layers, and random weights that are drawn
on the GPU. Decode steps of 1, 8 and 64 sequences come after 1,024 tokens. "op by op" runs the same
program without CUDA graphs. "limit" is the time to read what a step needs, which is the distinct
experts that its tokens choose, at the rate of a copy in the same run.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import torch
from h200 import decode_ms, prefill_ms
from moe_kernels import copy_rate, need_gpu
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

import moec
from moec.artefact.artefact import Artefact, open_artefact
from moec.runtime.engines import torch_program
from moec.runtime.engines.synthetic import synthetic
from moec.runtime.engines.torch_program import torch_with
from moec.runtime.open import artefact_session
from moec.runtime.session import Session
from moec.spec.presets import PRESETS

BATCHES, CONTEXT, PREFILL = (1, 8, 64), 1024, 8192


def sessions(artefact: Artefact) -> Iterator[Session]:
    """A session with CUDA graphs and one without, on the same weights."""
    manifest = artefact.manifest
    weights = synthetic(manifest.spec, 1, "cuda", manifest.compute, dialect=str(manifest.dialect))
    for graphs in (True, False):
        with patch.object(
            torch_program,
            "Replays",
            torch_program.Replays if graphs else lambda call, *_: call,
        ):
            # The first step makes its program, so that the patch must hold until then.
            session = artefact_session(artefact, "cuda", engine=torch_with(weights))
            _, cache = session.prefill(torch.tensor([[1, 2, 3]]), capacity=8)
            session.decode(torch.tensor([4]), cache)
        yield session


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    arguments.add_argument("--preset", default="qwen3-30b-a3b", choices=list(PRESETS))
    arguments.add_argument("--precision", default="fp8", choices=["fp8", "bf16"])
    arguments.add_argument("--layers", type=int)
    given = arguments.parse_args()
    need_gpu("benchmarks/plain_steps.py")
    spec = PRESETS[given.preset].model_copy(update={"vision": None})
    if given.layers:
        text = spec.text.model_copy(update={"layers": given.layers})
        spec = spec.model_copy(update={"text": text})
    rate, rows = copy_rate(), dict[str, list[float]]()
    with tempfile.TemporaryDirectory() as folder:
        artefact = open_artefact(
            moec.export(spec, "torch", given.precision, Path(folder) / "a").path
        )
        for session in sessions(artefact):
            for batch in BATCHES:
                took = decode_ms(session, batch, CONTEXT)
                rows.setdefault(f"decode, batch {batch}, 1k", []).append(took)
            took = prefill_ms(session, PREFILL)
            rows.setdefault(f"prefill, {PREFILL} tokens", []).append(took)
            memory = torch.cuda.max_memory_allocated()
            del session
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    for column in ("ms", "limit", "moec", "op by op", "op by op / moec"):
        table.add_column(column, justify="left" if column == "ms" else "right")
    for (name, (ours, by_op)), batch in zip(rows.items(), (*BATCHES, None), strict=True):
        limit = ""
        if batch:
            plan = moec.plan(spec, given.precision, context=CONTEXT, batch=batch)
            limit = f"{1e3 * plan.decode_read_bytes / rate:.2f}"
        table.add_row(name, limit, f"{ours:.2f}", f"{by_op:.2f}", f"{by_op / ours:.2f}")
    Console(width=100).print(table)
    print(
        f"{given.preset}, {spec.text.layers} layers, {given.precision}; "
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}; copy {rate / 1e12:.2f} TB/s; "
        f"most memory {memory / 1e9:.1f} GB"
    )


if __name__ == "__main__":
    main()
