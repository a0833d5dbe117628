"""Open Maverick's 24 x 128 experts with small widths, and show that a token reads one per layer.

    python benchmarks/many_experts.py

The script builds a checkpoint of 48 layers with Maverick's pattern and 1.2 GB of seeded random
weights. It opens the artefact in ONNX Runtime with both sets of session options. The peer has the
same MoE layers and weights, with its experts unrolled; see benchmarks/unrolled_experts.py.

The script then shows in two ways which weights one decode step uses:

- measured: the pages of the weights that the step brings into an emptied page cache;
- proven: with NaN in every expert that the step does not use, its logits do not change by a bit.

The exit code is 1 if moec takes 10 s or more to open, or if the proof fails.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime  # noqa: F401  (imported here, so that opening does not include the import)
import torch
from fresh_process import Outcome, call
from resident_pages import drop_pages, resident_bytes
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor
from unrolled_experts import unrolled_experts

import moec
from moec.artefact.artefact import Artefact, open_artefact
from moec.artefact.process_memory import memory
from moec.artefact.session_options import SETS
from moec.runtime.cache import Cache
from moec.runtime.engines.eager import eager_engine
from moec.runtime.engines.ort import ort_engine
from moec.runtime.session import Session
from moec.spec import names
from moec.spec.model import ModelSpec
from moec.spec.presets import PRESETS
from moec.spec.reduced import reduced
from moec.weights.random import write_random_checkpoint
from moec.weights.shard import TensorEntry

WIDTH = 256  # of the model and its experts: 24 x 128 experts of 3 x 256 x 256 in bf16 are 1.2 GB
OPEN_LIMIT_S, PEER_LIMIT_S = 10.0, 120.0
PROMPT = torch.arange(16)[None]
BF16_NAN = 0x7FC0

#: the tensors with the routed experts of each MoE layer, [expert, in, out]
Stacked = dict[int, tuple[TensorEntry, TensorEntry]]
#: the expert that a token chose in each MoE layer
Chosen = dict[int, int]
Figures = dict[str, float]


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
        unrolled = write_unrolled(built, folder / "unrolled")
        ours = {p: call(open_moec, built.path, p) for p in SETS}
        peer = {p: call(open_unrolled, built.path, unrolled, p, limit_s=PEER_LIMIT_S) for p in ours}
        rows = {("moec, whole model", built.path): ours, ("unrolled, MoE only", unrolled): peer}
        console.print(table(rows))
        fast_enough = all(
            each.value and each.value["open_s"] < OPEN_LIMIT_S for each in ours.values()
        )
        proven = one_expert_a_layer(built, console)
    return int(not (fast_enough and proven))


def narrow(spec: ModelSpec) -> ModelSpec:
    """`spec` with all its layers and experts, and widths of `WIDTH`."""
    small = reduced(spec)
    experts = small.text.experts.model_copy(update={"hidden": WIDTH, "shared_hidden": WIDTH})
    sizes = {"dim": WIDTH, "dense_hidden": WIDTH, "experts": experts}
    text = small.text.model_copy(update=sizes)
    return small.model_copy(update={"name": "narrow", "text": text, "vision": None})


def write_unrolled(built: Artefact, folder: Path) -> Path:
    """Write the peer's model to `folder`."""
    folder.mkdir()
    model = unrolled_experts(built.manifest.spec, built.entries(), built.weights_folder)
    ir.save(model, folder / "model.onnx")
    return folder


def open_moec(path: Path, preset: str) -> Figures:
    """Open the artefact at `path` and decode some tokens. It runs in its own process."""
    start = time.perf_counter()
    session = moec.open_session(path, session_options=preset)
    opened = time.perf_counter() - start
    logits, cache = session.prefill(PROMPT, capacity=2 * PROMPT.shape[1])
    return figures(opened, lambda: session.decode(logits.argmax(-1), cache), PROMPT.shape[1])


def open_unrolled(artefact: Path, folder: Path, preset: str) -> Figures:
    """Open the peer in `folder` with the weights of `artefact`. It runs in its own process."""
    manifest = open_artefact(artefact).manifest
    token = {"x": torch.randn(1, WIDTH)}
    start = time.perf_counter()
    run = ort_engine(Artefact(folder, manifest), preset)
    return figures(time.perf_counter() - start, lambda: run(token), 5)


def figures(opened: float, step: Callable[[], object], count: int) -> Figures:
    """Time `step`, and measure the process's own memory, without mapped pages of weights."""
    times = []
    for _ in range(count):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    own = memory().anonymous / 1e9
    return {"open_s": opened, "step_ms": statistics.median(times) * 1e3, "own_gb": own}


def table(rows: dict[tuple[str, Path], dict[str, Outcome]]) -> Table:
    """A table with a row for each model and set of session options."""
    result = Table("in ONNX Runtime", "options", box=SIMPLE, padding=0)
    heads = ("nodes", "file\nMB", f"open s\n< {OPEN_LIMIT_S:g}", "ms per\ntoken", "own\nGB")
    for head in heads:
        result.add_column(head, justify="right")
    for (name, folder), by_preset in rows.items():
        model = folder / "model.onnx"
        nodes, size = len(list(ir.load(model).graph.all_nodes())), model.stat().st_size / 1e6
        for preset, outcome in by_preset.items():
            cells = [f"{x:.3g}" for x in (outcome.value or {}).values()] or [outcome.error]
            result.add_row(name, preset, f"{nodes}", f"{size:.2f}", *cells)
    return result


def one_expert_a_layer(built: Artefact, console: Console) -> bool:
    """Measure which experts a decode step reads, then prove which it uses."""
    session = moec.open_session(built.path)
    logits, cache = session.prefill(PROMPT, capacity=PROMPT.shape[1] + 1)
    token = logits.argmax(-1)
    experts, chosen = stacked(built), chosen_experts(built, token, cache)
    expected = step(session, token, cache)
    console.print(measured(lambda: step(session, token, cache), experts, chosen))
    poison(experts, chosen)
    session = moec.open_session(built.path)
    same = torch.equal(step(session, token, cache), expected)
    seen = not session.logits(PROMPT).isfinite().all()  # otherwise NaN would prove nothing
    others = session.spec.text.experts.count - 1
    console.print(
        f"{'Proven' if same and seen else '[red]PROOF FAILED[/]'}: with NaN in the other {others} "
        f"experts of all {len(chosen)} MoE layers, the step's logits are "
        f"{'the same to the bit' if same else '[red]NOT the same[/]'}, "
        f"and those of other tokens {'are NaN' if seen else '[red]are not NaN: no proof[/]'}."
    )
    return same and seen


def step(session: Session, token: Tensor, cache: Cache) -> Tensor:
    """The logits of one decode step, which does not change `cache`."""
    return session.decode(token, replace(cache, tensors=dict(cache.tensors)))


def stacked(built: Artefact) -> Stacked:
    entries = built.entries()
    return {
        i: tuple(entries[name] for name in names.routed(i)) for i in moe_layers(built.manifest.spec)
    }


def moe_layers(spec: ModelSpec) -> list[int]:
    return [layer.index for layer in spec.text.all_layers if layer.moe]


def chosen_experts(built: Artefact, token: Tensor, cache: Cache) -> Chosen:
    """The experts that a decode step chooses in the eager reference."""
    taps = {i: names.chosen(i) for i in moe_layers(built.manifest.spec)}
    run = eager_engine(built.manifest.spec, built.entries(), taps=list(taps.values()))
    found = run(
        {
            names.INPUT_IDS: token[:, None],
            names.PAST_LENGTHS: cache.lengths,
            names.LENGTHS: torch.ones(1, dtype=torch.int64),
            names.LOGIT_INDEX: torch.zeros(1, 1, dtype=torch.int64),
            **cache.tensors,
        }
    )
    return {i: int(found[tap]) for i, tap in taps.items()}


def measured(run: Callable[[], object], experts: Stacked, chosen: Chosen) -> str:
    """The pages that `run` brings into an emptied page cache, of all and of the chosen experts."""
    every = [entry for pair in experts.values() for entry in pair]
    used = [entry[chosen[i]] for i, pair in experts.items() for entry in pair]
    for file in {entry.file for entry in every}:
        drop_pages(file)
    if left := resident_bytes(every):
        return f"Not measured: {left / 1e6:.1f} MB of experts stayed in the page cache."
    run()
    # Pages at the edges of a stack are not counted, because they belong to other weights too.
    sizes = [resident_bytes(every, whole=True), resident_bytes(used)]
    sizes += [sum(entry.nbytes for entry in group) for group in (used, every)]
    found, of_chosen, chosen_size, size = (f"{n / 1e6:.2f} MB" for n in sizes)
    return (
        f"Measured: a decode step reads {found} of {size} of routed experts. The pages of the "
        f"{len(chosen)} experts that it chose, one in each layer, have {of_chosen} "
        f"({chosen_size} of weights)."
    )


def poison(experts: Stacked, chosen: Chosen) -> None:
    """Overwrite each expert that was not chosen with NaN, on the disk."""
    for layer, pair in experts.items():
        for entry in pair:
            shape = (entry.shape[0], entry.nbytes // 2 // entry.shape[0])
            weights = np.memmap(entry.file, np.uint16, "r+", entry.offset, shape)
            weights[np.arange(len(weights)) != chosen[layer]] = BF16_NAN
            weights.flush()


if __name__ == "__main__":
    sys.exit(main())
