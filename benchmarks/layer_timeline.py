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


def ends(events: list[Any], before: int) -> list[tuple[str, float]]:
    """Name and microseconds of each launch, from the end of the one before; `before` is its end."""
    found = []
    for event in events:
        found.append((event.name.split("(")[0], event.time_range.end - before))
        before = max(before, event.time_range.end)
    return found


def launches_of(events: list[Any]) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
    """The launches of a layer, as means over layers; and those from one step to the next.

    Both go from one router to the next: from a step's last to the next step's first are a layer's
    launches too.
    """
    starts = [i for i, event in enumerate(events) if event.name.startswith("route")]
    known = [(events[i - 1].time_range.end, events[i:j]) for i, j in pairwise(starts) if i]
    usual = statistics.mode(len(layer) for _, layer in known)
    layers = [ends(layer, before) for before, layer in known if len(layer) == usual]
    most = max(len(layer) for _, layer in known)  # from step to step there are the most launches
    steps = [ends(layer, before) for before, layer in known if len(layer) == most]
    return _means(layers), _means(steps)


def _means(rows: list[list[tuple[str, float]]]) -> list[tuple[str, float]]:
    means = [statistics.mean(took for _, took in each) for each in zip(*rows, strict=True)]
    return [(name, mean) for (name, _), mean in zip(rows[-1], means, strict=True)]


def measure(
    session: Session, batch: int
) -> tuple[float, tuple[list[tuple[str, float]], list[tuple[str, float]]]]:
    """The milliseconds of a step with the choice of its token, and its launches."""
    ids = torch.randint(0, TEXT.vocab, (batch, CONTEXT), generator=torch.Generator().manual_seed(1))
    logits, cache = session.prefill(ids, capacity=CONTEXT + 8 * STEPS)
    tokens, times = logits.argmax(-1).cuda(), []
    for _ in range(6):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(STEPS):
            tokens = session.likeliest(tokens, cache)
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start) / STEPS)
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(3):
            tokens = session.likeliest(tokens, cache)
        torch.cuda.synchronize()
    events = [each for each in found.events() if each.device_type == DeviceType.CUDA]
    events.sort(key=lambda each: each.time_range.start)
    return statistics.median(times[1:]), launches_of(events)


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
            for title, part in zip(("a layer", "from step to step"), mine, strict=True):
                listed = ", ".join(f"{name} {each:.1f}" for name, each in part)
                say(f"    GPU {index}: {title} {sum(each for _, each in part):.1f} us: {listed}")
    if rank.count > 1:
        del session
        gc.collect()  # NCCL waits for CUDA graphs that use it
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
