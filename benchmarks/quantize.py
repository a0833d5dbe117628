"""Pack a synthetic checkpoint, and compare its rate with that of the disk.

    python benchmarks/quantize.py [--gigabytes 20] [--folder DIR] [--schemes meta,dynamic]

The script writes layers of Scout's widths with random weights, and builds them in a new process:
FP8 by a scheme. `quantize:SCHEME` is `moec quantize`, which writes a checkpoint. `int4` and
`int4-zeros` stand for a checkpoint of 4-bit integers in groups of 128, symmetric or with zero
points, and for `bind` of target ort: it joins experts, interleaves gate and up, and repeats scales.

In the same run `dd` reads the same shards, and writes as many bytes as the build. The script drops
the page cache before each of these, if it may. "of dd's" is the time that dd takes to read and then
to write, as a share of the build's time.
"""

import argparse
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from fresh_process import call
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from sparse_checkpoint import TYPES, stored

import moec
from moec.spec.hf.config import write_config
from moec.spec.model import ModelSpec
from moec.spec.scheme import ATTENTION, EXPERTS, INT4, SHARED, Rule, Scheme
from moec.weights.checkpoint import INDEX
from moec.weights.name_map import CheckpointTensor
from moec.weights.shard import nbytes

LIMITS = {False: 2e9, True: 1e9}  # bytes of memory that the build may use; True: of 4-bit integers
_QUANTISE = "quantize:"
LAYER = 2_202_101_760  # weights of one of Scout's layers
INTEGERS = {
    name: Scheme(
        name=INT4, layout=INT4, scales="bf16", block=128, zero_points=zeros,
        rules=(Rule(of=(*EXPERTS, *SHARED, *ATTENTION), weight="group"),),
    )
    for name, zeros in (("int4", False), ("int4-zeros", True))
}  # fmt: skip


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--gigabytes", type=float, default=20)
    arguments.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    arguments.add_argument("--schemes", default="meta,dynamic,deepseek")
    given = arguments.parse_args()
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    for column in ("", "read", "written", "time", "read rate", "of dd's", "peak memory"):
        table.add_column(column, justify="right" if column else "left")
    with tempfile.TemporaryDirectory(dir=given.folder) as scratch:
        folder = Path(scratch)
        stored_scheme, total = "none yet", 0
        for scheme in given.schemes.split(","):
            source = scheme if scheme in INTEGERS else ""
            if source != stored_scheme:
                shutil.rmtree(folder / "checkpoint", ignore_errors=True)
                total = _write(_spec(given.gigabytes * 1e9, source), folder / "checkpoint")
                stored_scheme = source
            if source:
                moec.export(moec.load_spec(folder / "checkpoint"), "ort", out=folder / "art")
            _drop_caches()
            action = _bind if source else _quantise if scheme.startswith(_QUANTISE) else _build
            outcome = call(action, folder / "checkpoint", folder / "art", scheme, limit_s=3000)
            if outcome.error:
                raise SystemExit(outcome.error)
            seconds, written = outcome.value
            reading = _read(folder / "checkpoint")
            packed = sorted((folder / "art").rglob("*.safetensors"))
            writing = sum(_writes(each, folder / "scratch") for each in packed)
            shutil.rmtree(folder / "art")
            over = outcome.peak_bytes >= LIMITS[bool(source)]
            table.add_row(
                scheme, _gb(total), _gb(written), f"{seconds:.1f} s",
                f"{total / seconds / 1e9:.2f} GB/s", f"{100 * (reading + writing) / seconds:.0f} %",
                _gb(outcome.peak_bytes) + (" OVER" if over else ""),
            )  # fmt: skip
            table.add_row("  dd reads", _gb(total), "", f"{reading:.1f} s", _rate(total, reading))
            table.add_row(
                "  dd writes", "", _gb(written), f"{writing:.1f} s", _rate(written, writing)
            )
    Console(width=110).print(table)


def _spec(size: float, integers: str) -> ModelSpec:
    """A model with as many of Scout's layers as fit in `size` bytes, and a small vocabulary."""
    scout = moec.load_spec("scout").model_copy(update={"scheme": INTEGERS.get(integers)})
    layers = max(1, round(size / (LAYER * (0.5 if integers else 2))))
    tokens = scout.tokens.model_copy(update={"bos": 0, "eos": (1,), "pad": 2, "image": None})
    text = scout.text.model_copy(update={"layers": layers, "vocab": 1024})
    return scout.model_copy(update={"text": text, "vision": None, "tokens": tokens})


def _write(spec: ModelSpec, folder: Path) -> int:
    """Write random weights, one shard for each layer.

    The random values repeat, which makes them no easier to quantise.
    """
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(write_config(spec)))
    noise = (torch.randn(1 << 25) / 64).bfloat16().view(torch.uint8).numpy().data
    shards: dict[str, list[CheckpointTensor]] = {}
    for row in stored(spec):
        layer = row.name.split(".")[1] if row.name.startswith("layers.") else "rest"
        shards.setdefault(f"model-{layer}.safetensors", []).append(row)
    total = 0
    for name, members in shards.items():
        header, end = {}, 0
        for row in members:
            start, end = end, end + nbytes(row.shape, row.dtype)
            kind = TYPES[row.dtype][0]
            header[row.key] = {"dtype": kind, "shape": row.shape, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for row in members:
                left = nbytes(row.shape, row.dtype)
                source = memoryview(bytes(left)) if row.dtype == "int64" else noise  # shapes
                while left > 0:
                    left -= file.write(source[:left])
        total += end
    weight_map = {row.key: name for name, members in shards.items() for row in members}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    os.sync()
    return total


def _build(checkpoint: Path, out: Path, scheme: str) -> tuple[float, int]:
    """The seconds until the weights are on the disk, and their bytes."""
    start = time.perf_counter()
    art = moec.export(checkpoint, precision="fp8", scheme=scheme, out=out)
    return time.perf_counter() - start, art.manifest.build.bytes_packed


def _quantise(checkpoint: Path, out: Path, scheme: str) -> tuple[float, int]:
    """The same for `moec quantize`."""
    start = time.perf_counter()
    done = moec.quantize(checkpoint, scheme.removeprefix(_QUANTISE), out)
    return time.perf_counter() - start, sum(done.files.values())


def _bind(checkpoint: Path, out: Path, scheme: str) -> tuple[float, int]:
    """The seconds until the integers are on the disk, and the bytes of the packed file."""
    start = time.perf_counter()
    art = moec.bind(out, checkpoint)
    return time.perf_counter() - start, art.manifest.build.bytes_packed


def _drop_caches() -> None:
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        print("the page cache could not be dropped: reads may come from memory")


def _read(folder: Path) -> float:
    _drop_caches()
    start = time.perf_counter()
    for shard in sorted(folder.glob("*.safetensors")):
        _dd(f"if={shard}", "of=/dev/null")
    return time.perf_counter() - start


def _writes(source: Path, path: Path) -> float:
    """The seconds to write a copy of `source`, without those to read it.

    It is a copy of real data, because a disk may write zeros faster.
    """
    _drop_caches()
    start = time.perf_counter()
    _dd(f"if={source}", "of=/dev/null")
    reading = time.perf_counter() - start
    _drop_caches()
    start = time.perf_counter()
    _dd(f"if={source}", f"of={path}", "conv=fdatasync")
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds - reading


def _dd(*what: str) -> None:
    subprocess.run(["dd", "bs=16M", *what], check=True, stderr=subprocess.DEVNULL)


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def _rate(size: float, seconds: float) -> str:
    return f"{size / seconds / 1e9:.2f} GB/s"


if __name__ == "__main__":
    main()
