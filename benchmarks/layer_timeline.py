"""Show where the time of a decode step goes: the kernel launches of one layer of Scout.

    python benchmarks/layer_timeline.py [--layers 8] [--batches 1,2,4,8,16]
    python -m torch.distributed.run --nproc-per-node 2 benchmarks/layer_timeline.py

The model has some of Scout's layers, its embedding and its head, in FP8 with random weights, and
runs through an artefact of target torch. For each batch the script prints the wall-clock time of a
step. For each launch of a layer it prints the microseconds from the end of the previous launch to
its own end, from torch's profiler, as the mean over layers. Launches overlap. What a launch does
before the previous one ends is not counted as its time. Under torchrun the GPUs share the
model; `all_reduce` is the sum over ranks, with the time that a GPU waits for the others.
"""

import argparse
import gc
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from h200 import TEXT
from moe_kernels import copy_rate, need_gpu
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import moec
from moec.artefact.artefact import open_artefact
from moec.runtime.engines.synthetic import synthetic
from moec.runtime.engines.torch_program import torch_with
from moec.runtime.open import artefact_session
from moec.runtime.ranks.group import join
from moec.runtime.session import Session
from moec.spec.model import ModelSpec

CONTEXT, STEPS = 1024, 16


def first_launches(events: list[Any]) -> list[tuple[str, float]]:
    """Name and microseconds of each launch, from the router of a layer to that of the next."""
    starts = [i for i, event in enumerate(events) if event.name.startswith("route")]
    layers = [events[i:j] for i, j in pairwise(starts)]
    usual = statistics.mode(len(layer) for layer in layers)  # other lengths include a step's end
    found: list[list[float]] = [[] for _ in range(usual)]
    for start, layer in zip(starts, layers, strict=False):
        if start and len(layer) == usual:
            end = events[start - 1].time_range.end
            for i, event in enumerate(layer):
                found[i].append(event.time_range.end - end)
                end = max(end, event.time_range.end)
            names = [event.name.split("(")[0] for event in layer]
    return list(zip(names, map(statistics.mean, found), strict=True))


def measure(session: Session, batch: int) -> tuple[float, list[tuple[str, float]]]:
    """The milliseconds of a step with the choice of its token, and the launches of a layer."""
    ids = torch.randint(0, TEXT.vocab, (batch, CONTEXT), generator=torch.Generator().manual_seed(1))
    logits, cache = session.prefill(ids, capacity=CONTEXT + 8 * STEPS)
    tokens, times = logits.argmax(-1).cuda(), []
    for _ in range(6):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(STEPS):
            tokens = session.decode(tokens, cache).argmax(-1)
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start) / STEPS)
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(3):
            tokens = session.decode(tokens, cache).argmax(-1)
        torch.cuda.synchronize()
    events = [each for each in found.events() if each.device_type == DeviceType.CUDA]
    events.sort(key=lambda each: each.time_range.start)
    return statistics.median(times[1:]), first_launches(events)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--layers", type=int, default=8)
    arguments.add_argument("--batches", default="1,2,4,8,16")
    given = arguments.parse_args()
    need_gpu("benchmarks/layer_timeline.py")
    rank = join("cuda")
    rate = copy_rate()
    say = print if rank.index == 0 else lambda *_, **__: None
    say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: copy {rate / 1e12:.2f} TB/s")
    text = TEXT.model_copy(update={"layers": given.layers})
    spec = ModelSpec(name="layers", provenance="custom", dtype="bf16", text=text)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "layers"
        artefact = open_artefact(moec.export(spec, target="torch", precision="fp8", out=out).path)
        weights = synthetic(artefact.manifest.spec, 1, "cuda", rank=rank)
        session = artefact_session(artefact, "cuda", engine=torch_with(weights, rank))
    for batch in map(int, given.batches.split(",")):
        took, launches = measure(session, batch)
        every = [launches]
        if rank.count > 1:
            every = [launches] * rank.count
            dist.all_gather_object(every, launches)
        read = moec.plan(spec, "fp8", context=CONTEXT, batch=batch).decode_read_bytes / rank.count
        say(f"batch {batch}: {took:.3f} ms, {100 * read / took * 1e3 / rate:.1f} % of the copy")
        for index, mine in enumerate(every):
            layer = ", ".join(f"{name} {each:.1f}" for name, each in mine)
            say(f"    GPU {index}: a layer {sum(each for _, each in mine):.1f} us: {layer}")
    if rank.count > 1:
        del session
        gc.collect()  # NCCL waits for CUDA graphs that use it
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
