"""Maverick's 24 x 128 experts, narrow: how fast they open, and that a token reads one per layer.

    python benchmarks/many_experts.py

A checkpoint of 48 layers with Maverick's pattern and 1.2 GB of seeded random weights is built and
opened in ONNX Runtime. What one decode step touches is shown twice:

- measured: the pages of the weights that it brings into an emptied page cache;
- proven: with NaN in every expert that it does not use, its logits stay the same to the bit.

Beside it the peer, the same MoE layers with their experts unrolled, on the same weights with the
same session options; see benchmarks/unrolled_experts.py.

Exit code 1 if opening takes 10 s or more, or if the proof fails.
"""

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime  # noqa: F401  (imported here, so that its import is not in the time to open)
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

import moec
from fresh_process import Outcome, call
from resident_pages import drop_pages, resident_bytes
from unrolled_experts import unrolled_experts
from moec.exporters.artefact import Artefact, open_artefact
from moec.runtime.cache import Cache
from moec.runtime.eager import eager_engine
from moec.runtime.ort import ort_engine
from moec.runtime.session import Session
from moec.spec.model import ModelSpec
from moec.spec.presets import PRESETS
from moec.spec.twin import twin
from moec.weights.random import write_random_checkpoint
from moec.weights.shard import TensorEntry

WIDTH = 256  # of the model and its experts: 24 x 128 experts of 3 x 256 x 256 in bf16 are 1.2 GB
OPEN_LIMIT_S, PEER_LIMIT_S = 10.0, 120.0
PROMPT, STEPS = torch.arange(16)[None], 32
BF16_NAN = 0x7FC0

#: MoE layer -> the tensors that hold its routed experts, [expert, in, out]
Fused = dict[int, tuple[TensorEntry, TensorEntry]]
#: MoE layer -> the expert that a token chose
Chosen = dict[int, int]


def main() -> int:
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    console = Console(highlight=False)
    with (
        tempfile.TemporaryDirectory(prefix="moec-benchmark-") as name,
        console.status("building and running"),
    ):
        folder = Path(name)
        write_random_checkpoint(narrow(PRESETS["maverick"]), folder / "weights")
        built = moec.export(folder / "weights", out=folder / "moec")
        session, opened = open_timed(built)
        step = decode_ms(session)
        peer = measure_peer(built, folder / "peer")
        rows = {
            "moec, the whole model": (built.path, Outcome({"open_s": opened, "step_ms": step})),
            "unrolled, the MoE layers alone": (folder / "peer", peer),
        }
        console.print(table(rows))

        logits, cache = session.prefill(PROMPT, capacity=PROMPT.shape[1] + 1)
        token = logits.argmax(-1)
        experts, chosen = fused(built), chosen_experts(built, token, cache)
        console.print(touched(session, token, cache, experts, chosen))
        expected = step_logits(session, token, cache)
        poison(experts, chosen)
        session, _ = open_timed(built)
        same = torch.equal(step_logits(session, token, cache), expected)
        seen = not session.logits(PROMPT).isfinite().all()  # else NaN would prove nothing
        count = session.spec.text.experts.count - 1
        console.print(
            f"Proven: NaN in the other {count} experts of all {len(chosen)} layers. Logits of the "
            f"step: {'the same to the bit' if same else '[red]CHANGED[/]'}. Logits of other "
            f"tokens: {'NaN, as they must be' if seen else '[red]NOT NaN: no proof[/]'}."
        )
    return int(opened >= OPEN_LIMIT_S or not same or not seen)


def narrow(spec: ModelSpec) -> ModelSpec:
    """`spec` with all its layers and experts, each `WIDTH` wide."""
    small = twin(spec)
    experts = small.text.experts.model_copy(update={"hidden": WIDTH, "shared_hidden": WIDTH})
    update = {"dim": WIDTH, "dense_hidden": WIDTH, "experts": experts}
    text = small.text.model_copy(update=update)
    return small.model_copy(update={"name": "narrow", "text": text, "vision": None})


def open_timed(built: Artefact) -> tuple[Session, float]:
    start = time.perf_counter()
    session = moec.open_session(built.path)
    return session, time.perf_counter() - start


def decode_ms(session: Session) -> float:
    """Median of greedy decode steps, one row."""
    logits, cache = session.prefill(PROMPT, capacity=PROMPT.shape[1] + STEPS)
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        logits = session.decode(logits.argmax(-1), cache)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def measure_peer(built: Artefact, folder: Path) -> Outcome:
    """Write the unrolled experts to `folder`, and open them in a process that may be stopped."""
    folder.mkdir()
    spec, root = built.manifest.spec, built.weights_folder
    ir.save(unrolled_experts(spec, built.entries(), root), folder / "model.onnx")
    return call(open_peer, str(built.path), str(folder), limit_s=PEER_LIMIT_S)


def open_peer(artefact: str, folder: str) -> dict[str, float]:
    """Open `folder` with the weights and the session options of `artefact`; run one token."""
    manifest = open_artefact(artefact).manifest
    start = time.perf_counter()
    run = ort_engine(Artefact(Path(folder), manifest))
    opened = time.perf_counter() - start
    times = []
    for _ in range(4):
        start = time.perf_counter()
        run({"x": torch.ones(1, manifest.spec.text.dim)})
        times.append(time.perf_counter() - start)
    return {"open_s": opened, "step_ms": statistics.median(times) * 1e3}


def table(rows: dict[str, tuple[Path, Outcome]]) -> Table:
    result = Table("in ONNX Runtime", box=SIMPLE)
    for head in ("nodes", "file\nMB", f"open s\n< {OPEN_LIMIT_S:g}", "ms per\ntoken"):
        result.add_column(head, justify="right")
    for name, (folder, outcome) in rows.items():
        model = folder / "model.onnx"
        nodes, size = len(list(ir.load(model).graph.all_nodes())), model.stat().st_size / 1e6
        figures = outcome.value or {"open_s": outcome.error, "step_ms": "-"}
        cells = (x if isinstance(x, str) else f"{x:.3g}" for x in figures.values())
        result.add_row(name, f"{nodes}", f"{size:.2f}", *cells)
    return result


def fused(built: Artefact) -> Fused:
    entries = built.entries()
    return {
        i: (entries[f"layers.{i}.moe.gate_up"], entries[f"layers.{i}.moe.down"])
        for i in moe_layers(built.manifest.spec)
    }


def moe_layers(spec: ModelSpec) -> list[int]:
    return [layer.index for layer in spec.text.all_layers if layer.moe]


def chosen_experts(built: Artefact, token: Tensor, cache: Cache) -> Chosen:
    """The experts of a decode step, by the eager reference."""
    taps = {i: f"layers.{i}.moe.route.1" for i in moe_layers(built.manifest.spec)}
    run = eager_engine(built.manifest.spec, built.entries(), taps=list(taps.values()))
    found = run(
        {
            "input_ids": token[:, None],
            "past_lengths": cache.lengths,
            "lengths": torch.ones(1, dtype=torch.int64),
            "logit_index": torch.zeros(1, 1, dtype=torch.int64),
            **cache.tensors,
        }
    )
    return {i: int(found[tap]) for i, tap in taps.items()}


def step_logits(session: Session, token: Tensor, cache: Cache) -> Tensor:
    """One decode step that leaves `cache` as it is."""
    return session.decode(token, replace(cache, tensors=dict(cache.tensors)))


def touched(session: Session, token: Tensor, cache: Cache, experts: Fused, chosen: Chosen) -> str:
    """Run one decode step on an empty page cache; say what it read of the routed experts."""
    every = [entry for pair in experts.values() for entry in pair]
    used = [entry[chosen[layer]] for layer, pair in experts.items() for entry in pair]
    for file in {entry.file for entry in every}:
        drop_pages(file)
    left = resident_bytes(every)
    step_logits(session, token, cache)
    found, of_used = resident_bytes(every), resident_bytes(used)
    if left:
        return f"Not measured: {left / 1e6:.1f} MB of experts would not leave the page cache."
    total, needed = (sum(entry.nbytes for entry in group) / 1e6 for group in (every, used))
    return (
        f"Measured: of {total:.0f} MB of routed experts a decode step reads {found / 1e6:.2f} MB, "
        f"{of_used / 1e6:.2f} MB of them pages of the {len(chosen)} experts that it chose, one a "
        f"layer, which are {needed:.2f} MB."
    )


def poison(experts: Fused, chosen: Chosen) -> None:
    """Overwrite each expert that was not chosen with NaN, on disk."""
    for layer, pair in experts.items():
        for entry in pair:
            shape = (entry.shape[0], entry.nbytes // 2 // entry.shape[0])
            weights = np.memmap(entry.file, np.uint16, "r+", entry.offset, shape)
            keep = np.arange(len(weights)) == chosen[layer]
            weights[~keep] = BF16_NAN
            weights.flush()


if __name__ == "__main__":
    sys.exit(main())
