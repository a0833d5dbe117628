"""Quantise a synthetic checkpoint to FP8, and compare its rate with that of the disk.

    python benchmarks/quantize.py [--gigabytes 20] [--folder DIR] [--schemes meta,dynamic]

The script writes layers of Scout's widths with random weights, and builds them in a new process. In
the same run `dd` reads the same shards, and writes as many bytes as the build. The script drops the
page cache before each of these, if it may. "of dd's" is the time that dd takes to read and then to
write, as a share of the build's time.
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

import moec
from moec.spec.hf.config import write_config
from moec.spec.model import ModelSpec
from moec.weights.checkpoint import INDEX
from moec.weights.name_map import CheckpointTensor, checkpoint_tensors
from moec.weights.packed_journal import PACKED
from moec.weights.shard import nbytes

LIMIT = 2e9  # bytes of memory that the build may use
LAYER = 2 * 2_202_101_760  # bytes of one of Scout's layers


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
        spec = _spec(given.gigabytes * 1e9)
        total = _write(spec, folder / "checkpoint")
        for scheme in given.schemes.split(","):
            _drop_caches()
            outcome = call(_build, folder / "checkpoint", folder / "art", scheme, limit_s=3000)
            if outcome.error:
                raise SystemExit(outcome.error)
            seconds, written = outcome.value
            reading = _read(folder / "checkpoint")
            writing = _writes(folder / "art" / PACKED, folder / "scratch")
            shutil.rmtree(folder / "art")
            table.add_row(
                scheme, _gb(total), _gb(written), f"{seconds:.1f} s",
                f"{total / seconds / 1e9:.2f} GB/s", f"{100 * (reading + writing) / seconds:.0f} %",
                _gb(outcome.peak_bytes) + ("" if outcome.peak_bytes < LIMIT else " OVER"),
            )  # fmt: skip
            table.add_row("  dd reads", _gb(total), "", f"{reading:.1f} s", _rate(total, reading))
            table.add_row(
                "  dd writes", "", _gb(written), f"{writing:.1f} s", _rate(written, writing)
            )
    Console(width=110).print(table)


def _spec(size: float) -> ModelSpec:
    """A model with as many of Scout's layers as fit in `size` bytes, and a small vocabulary."""
    scout = moec.load_spec("scout")
    layers = max(1, round(size / LAYER))
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
    for row in checkpoint_tensors(spec):
        layer = row.name.split(".")[1] if row.name.startswith("layers.") else "rest"
        shards.setdefault(f"model-{layer}.safetensors", []).append(row)
    total = 0
    for name, members in shards.items():
        header, end = {}, 0
        for row in members:
            start, end = end, end + nbytes(row.shape, row.dtype)
            header[row.key] = {"dtype": "BF16", "shape": row.shape, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for at in range(0, end, len(noise)):
                file.write(noise[: end - at])
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
