"""Compare FP8 in ONNX Runtime on a GPU with target torch: Scout's widths, one set of weights.

    python benchmarks/ort_library.py [--layers 48]

Random weights are drawn on the GPU and given to both sessions. The script first compares their
logits with two layers, in prefill and in decode, and ends with exit code 1 if they differ by more
than FP8 explains. (More random layers turn a rounding in the first into other tokens in the last.)
Times are for a step of the whole batch after prompts of 1,024 tokens: medians of steps that are
each awaited, and the mean of steps that are queued; and for a prompt of 8,192 tokens. The bound is
the time to read what the step needs (`moec.plan`), at the bandwidth of a large copy in this run.
"""

import argparse
import gc
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from moe_kernels import copy_rate, need_gpu
from rich.console import Console
from rich.table import Table

import moec
from moec.artefact.artefact import open_artefact
from moec.runtime.engines.ort_cuda.engine import ort_cuda_with
from moec.runtime.engines.synthetic import synthetic
from moec.runtime.engines.torch_program import torch_with
from moec.runtime.open import artefact_session
from moec.spec.model import ModelSpec
from moec.spec.presets import PRESETS

BATCHES, CONTEXT, LONG, STEPS = (1, 8, 64), 1024, 8192, 24
#: what rounding to FP8 in other places may change, as in tests/gpu/test_fused_targets.py
NOISE = 6e-2
ENGINES = {"ort": ("ort-cuda", ort_cuda_with), "torch": ("torch", torch_with)}


def scout(layers: int, **other: str | int) -> ModelSpec:
    """Scout's decoder with so many layers, and `other` fields, such as patterns of its layers."""
    text = PRESETS["scout"].text.model_copy(update={"layers": layers, **other})
    return ModelSpec(name="scout", provenance="custom", dtype="bf16", text=text)


def figures(session: Any) -> dict[str, Any]:
    """Milliseconds by row."""
    vocab, found = PRESETS["scout"].text.vocab, {}
    for batch in BATCHES:
        generator = torch.Generator().manual_seed(batch)
        ids = torch.randint(0, vocab, (batch, CONTEXT), generator=generator)
        steps = torch.randint(0, vocab, (STEPS, batch), generator=generator).cuda()
        _, cache = session.prefill(ids, capacity=CONTEXT + 2 * STEPS)
        times = []
        for tokens in steps:
            torch.cuda.synchronize()
            start = time.perf_counter()
            session.decode(tokens, cache)
            torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - start))
        found[f"batch {batch}"] = statistics.median(times[8:])
        start = time.perf_counter()
        for tokens in steps:
            session.decode(tokens, cache)
        torch.cuda.synchronize()
        found[f"batch {batch}, queued"] = 1e3 * (time.perf_counter() - start) / STEPS
    ids = torch.randint(0, vocab, (1, LONG), generator=torch.Generator().manual_seed(1))
    times = []
    for _ in range(4):
        torch.cuda.synchronize()
        start = time.perf_counter()
        session.prefill(ids)
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    found[f"prefill {LONG}"] = min(times)
    found["GB"] = torch.cuda.mem_get_info()[1] / 1e9 - torch.cuda.mem_get_info()[0] / 1e9
    return found


def difference(folder: Path) -> float:
    """The median relative error of a token's logits of two layers, prefill and 8 steps."""
    spec = scout(2, attention="LG", rope="RN", qk_norm="Q-", temperature="-T")
    weights = synthetic(spec, 2, "cuda")
    ids = torch.randint(0, spec.text.vocab, (3, 208), generator=torch.Generator().manual_seed(3))
    results = []
    for name, (target, engine) in ENGINES.items():
        art = moec.export(spec, target=target, precision="fp8", out=folder / f"two-{name}")
        session = artefact_session(open_artefact(art.path), "cuda", engine=engine(weights))
        logits, cache = session.prefill(ids[:, :200], capacity=208)
        steps = [session.decode(tokens, cache) for tokens in ids[:, 200:].T]
        results.append(torch.stack([each.float().cuda() for each in (logits, *steps)]))
    ours, theirs = results
    return float(((ours - theirs).norm(dim=2) / theirs.norm(dim=2)).median())


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=48)
    layers = parser.parse_args().layers
    need_gpu("benchmarks/ort_library.py")
    with tempfile.TemporaryDirectory() as folder:
        off = difference(Path(folder))
    print(f"two layers: logits of a token differ by {off:.1e}")
    if off > NOISE:
        raise SystemExit(1)
    rate, spec = copy_rate(), scout(layers)
    weights, found = synthetic(spec, 1, "cuda"), {}
    size = sum(each.numel() * each.element_size() for each in weights.values())
    with tempfile.TemporaryDirectory() as folder:
        for name, (target, engine) in ENGINES.items():
            art = moec.export(spec, target=target, precision="fp8", out=Path(folder) / name)
            start = time.perf_counter()
            session = artefact_session(open_artefact(art.path), "cuda", engine=engine(weights))
            opened = time.perf_counter() - start
            found[name] = figures(session) | {"opened, s": opened}
            print(name, {k: round(v, 2) for k, v in found[name].items() if isinstance(v, float)})
            del session
            gc.collect()
            torch.cuda.empty_cache()
    console = Console(width=120)
    title = f"Scout, {layers} layers, {size / 1e9:.1f} GB, on {torch.cuda.get_device_name()}"
    table = Table("", "ONNX Runtime", "torch", "ratio", "bound", title=title)
    steps = (f"batch {n}{more}" for n in BATCHES for more in ("", ", queued"))
    for row in (*steps, f"prefill {LONG}", "GB", "opened, s"):
        ours, theirs = found["ort"][row], found["torch"][row]
        bound = ""
        if row.startswith("batch"):
            batch = int(row.split()[1].rstrip(","))
            plan = moec.plan(spec, "fp8", context=CONTEXT, batch=batch)
            bound = f"{1e3 * plan.decode_read_bytes / rate:.2f}"
        table.add_row(row, f"{ours:.2f}", f"{theirs:.2f}", f"{ours / theirs:.3f}", bound)
    console.print(table)


if __name__ == "__main__":
    main()
