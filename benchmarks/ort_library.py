"""Compare FP8 in ONNX Runtime on a GPU with target torch: Scout's widths, one set of weights.

    python benchmarks/ort_library.py [--layers 48]

Random weights are drawn on the GPU and given to both sessions. The script compares their logits in
prefill and in decode before it times anything. Times are for a step of the whole batch after
prompts of 1,024 tokens, medians after steps that warm up; and for a prompt of 8,192 tokens. The
bound is the time to read what the step needs (`moec.plan`), at the bandwidth of a large copy in the
same run.
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
ENGINES = {"ort": ("ort-cuda", ort_cuda_with), "torch": ("torch", torch_with)}


def scout(layers: int) -> ModelSpec:
    """Scout's decoder with so many layers."""
    text = PRESETS["scout"].text.model_copy(update={"layers": layers})
    return ModelSpec(name="scout", provenance="custom", dtype="bf16", text=text)


def figures(session: Any) -> dict[str, Any]:
    """Milliseconds by row, and the logits that are compared."""
    vocab, found = PRESETS["scout"].text.vocab, {}
    for batch in BATCHES:
        generator = torch.Generator().manual_seed(batch)
        ids = torch.randint(0, vocab, (batch, CONTEXT), generator=generator)
        steps = torch.randint(0, vocab, (STEPS, batch), generator=generator).cuda()
        first, cache = session.prefill(ids, capacity=CONTEXT + STEPS)
        logits, times = [first.float()], []
        for tokens in steps:
            torch.cuda.synchronize()
            start = time.perf_counter()
            last = session.decode(tokens, cache)
            torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - start))
        logits.append(last.float())
        found[f"batch {batch}"] = statistics.median(times[8:])
        found[f"logits {batch}"] = torch.stack([each.cuda() for each in logits])
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


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=48)
    layers = parser.parse_args().layers
    need_gpu("benchmarks/ort_library.py")
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
    for row in (*(f"batch {n}" for n in BATCHES), f"prefill {LONG}", "GB", "opened, s"):
        ours, theirs = found["ort"][row], found["torch"][row]
        bound = ""
        if row.startswith("batch"):
            batch = int(row.split()[1])
            plan = moec.plan(spec, "fp8", context=CONTEXT, batch=batch)
            bound = f"{1e3 * plan.decode_read_bytes / rate:.2f}"
        table.add_row(row, f"{ours:.2f}", f"{theirs:.2f}", f"{ours / theirs:.3f}", bound)
    for batch in BATCHES:
        ours, theirs = (found[name][f"logits {batch}"] for name in ("ort", "torch"))
        off = ((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).flatten(1).median(1).values
        same = 100 * (ours.argmax(-1) == theirs.argmax(-1)).float().mean(1)
        shown = (f"{a:.1e}, {b:.0f} %" for a, b in zip(off.tolist(), same.tolist(), strict=True))
        table.add_row(f"batch {batch}, prefill and step: off, same", *shown)
    console.print(table)


if __name__ == "__main__":
    main()
