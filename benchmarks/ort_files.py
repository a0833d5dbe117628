"""Open layers of Scout in FP8 from files, in ONNX Runtime on a GPU, beside a plain read and copy.

    python benchmarks/ort_files.py [--gigabytes 37] [--pack] [--folder DIR]

The script writes a checkpoint of Scout's widths to DIR, and builds it for target `ort-cuda`. The
checkpoint is in FP8 and the weights stay in place; with `--pack` it is in bf16, and the build packs
it, so that all weights are external data that ONNX Runtime can read by itself. One row more is then
a session of its own, made from the path of `model.onnx` alone.

Each row is a process of its own, and no page of the files is in the system's cache before it
starts. `read and copy` reads the files once, 64 MiB at a time, into two pinned buffers in turn, and
copies each to the GPU. A session opens the artefact and takes one step; its library is compiled
before. Host memory is the peak of the process less what it held before; GPU memory is what it took
on the device. The exit code is 1 if a session of moec reads at under 80 % of the rate of `read and
copy`, or if it takes 5 GB of host memory or 15 % of the weights' size more on the GPU.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from fresh_process import call
from moe_kernels import need_gpu
from ort_library import scout
from resident_pages import drop_pages
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from sparse_checkpoint import write_sparse_checkpoint

import moec
from moec.artefact.artefact import open_artefact
from moec.artefact.process_memory import memory
from moec.exporters.ort_library.build import own_library
from moec.exporters.ort_library.operations import operations_for
from moec.spec.hf.written import told
from moec.spec.model import ModelSpec
from moec.spec.scheme import SCHEMES

BLOCK = 64 << 20
RATE, HOST, GPU = 0.80, 5e9, 1.15
PLAIN = "read and copy"


def spec_of(gigabytes: float, wide: bool) -> ModelSpec:
    """As many layers of Scout as take so much in FP8, with a small vocabulary."""
    spec = scout(max(4, int(gigabytes / 2.26) // 4 * 4), vocab=32768)
    return spec if wide else told(spec, SCHEMES["dynamic"])[0]


def fill(folder: Path) -> None:
    """Write small numbers behind the headers of all shards."""
    block = np.random.default_rng(1).integers(0x20, 0x38, BLOCK, np.uint8).tobytes()
    for path in shards(folder):
        with path.open("r+b") as file:
            at = 8 + int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            file.seek(at)
            while at < size:
                at += file.write(block[: size - at])
            file.flush()
            os.fsync(file.fileno())


def shards(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def plain(folder: str) -> tuple[float, object]:
    """Read all files and copy them to the GPU; the seconds of that, and the copy."""
    files = shards(Path(folder))
    room = torch.empty(sum(each.stat().st_size for each in files), dtype=torch.uint8, device="cuda")
    buffers = [torch.empty(BLOCK, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    copied = [torch.cuda.Event() for _ in buffers]
    torch.cuda.synchronize()
    start, at, turn = time.perf_counter(), 0, 0
    for path in files:
        with path.open("rb", buffering=0) as file:
            while True:
                copied[turn].synchronize()
                count = file.readinto(buffers[turn].numpy())
                if not count:
                    break
                room[at : at + count].copy_(buffers[turn][:count], non_blocking=True)
                copied[turn].record()
                at, turn = at + count, 1 - turn
    torch.cuda.synchronize()
    return time.perf_counter() - start, room


def by_session(path: str) -> tuple[float, object]:
    """Open an artefact as a session of moec, and take one step; the seconds, and the session."""
    start = time.perf_counter()
    session = moec.open_session(path, device="cuda")
    logits, _ = session.prefill([[1, 2, 3]])
    assert logits.isfinite().all()
    return time.perf_counter() - start, session


def by_itself(path: str) -> tuple[float, object]:
    """Open model.onnx by its path, as a program without moec does; the seconds, and the session."""
    import onnxruntime

    library = own_library(operations_for(open_artefact(path).manifest), [90])
    start = time.perf_counter()
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library))
    model = f"{path}/model.onnx"
    session = onnxruntime.InferenceSession(model, options, ["CUDAExecutionProvider"])
    return time.perf_counter() - start, session


def measured(function: Callable[[str], tuple[float, object]], path: str) -> dict[str, float]:
    """What a call takes in seconds and in bytes of the host and the GPU, over an open context."""
    torch.ones(1, device="cuda")
    torch.empty(BLOCK, pin_memory=True)
    free, before = torch.cuda.mem_get_info()[0], memory()
    seconds, kept = function(path)
    torch.cuda.synchronize()
    gpu = free - torch.cuda.mem_get_info()[0]
    del kept
    return {
        "seconds": seconds,
        "gpu": gpu,
        "host": memory().peak - before.anonymous - before.mapped,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=37)
    parser.add_argument("--pack", action="store_true")
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    need_gpu("benchmarks/ort_files.py")
    with tempfile.TemporaryDirectory(dir=given.folder) as scratch:
        late = table_of(Path(scratch), spec_of(given.gigabytes, given.pack))
    sys.exit(bool(late))


def table_of(folder: Path, spec: ModelSpec) -> list[str]:
    """Print the table; the rows that keep a limit not."""
    checkpoint, art = folder / "checkpoint", folder / "art"
    with stage("wrote the checkpoint"):
        write_sparse_checkpoint(spec, checkpoint, 5 * 10**9)
        fill(checkpoint)
    with stage("built"):
        moec.export(checkpoint, "ort-cuda", "fp8", art)
    with stage("compiled the library"):
        own_library(operations_for(open_artefact(art).manifest), [90])
    files = checkpoint if spec.scheme else art
    rows: list[tuple[str, Callable[[str], tuple[float, object]], Path]] = [
        (PLAIN, plain, files),
        ("session", by_session, art),
        (f"{PLAIN}, again", plain, files),
    ]
    if not spec.scheme:
        rows.append(("ONNX Runtime by itself", by_itself, art))
    total = sum(each.stat().st_size for each in shards(files))
    table, late, best = Table(box=SIMPLE), list[str](), 0.0
    for column in ("", "seconds", "GB/s", "of read and copy", "host, GB", "GPU, of the files"):
        table.add_column(column, justify="right" if column else "left")
    for name, function, path in rows:
        for shard in shards(files):
            drop_pages(shard)
        outcome = call(measured, function, str(path))
        if outcome.error:
            print(f"{name}: {outcome.error}")
            late.append(name)
            continue
        found, rate = outcome.value, total / outcome.value["seconds"]
        best = max(best, rate) if function is plain else best
        share, more = rate / best, found["gpu"] / total
        cells = [f"{found['seconds']:.1f}", f"{rate / 1e9:.2f}", f"{share:.2f}"]
        table.add_row(name, *cells, f"{found['host'] / 1e9:.2f}", f"{more:.2f}")
        kept = share >= RATE and found["host"] < HOST and more < GPU
        if function is by_session and not kept:
            late.append(name)
    Console(width=110).print(table)
    print(
        f"{total / 1e9:.1f} GB, {spec.text.layers} layers; limits: {', '.join(late) or 'all kept'}"
    )
    return late


@contextmanager
def stage(done: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    print(f"{done} in {time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
