"""Build TensorRT engines of TensorRT-RTX for SM89 and SM120, and measure seconds, bytes and memory.

    python benchmarks/tensorrt_builds.py [--full] [--json FILE]

The builds need no GPU, and none of the TensorRT engines is run. Each build has a limit. `two
layers` are two decoder layers of full width, with all weights as inputs of the engine. `tower` is
the whole vision tower of Scout. `all layers, ONNX only` writes the ONNX of the full model and
builds no engine. In `plugin` the MoE plugin runs the experts; it is compiled with the headers in
tests/exporters/tensorrt_plugin/include. `--full` also builds whole decoders, with all weights as
inputs.

The exit code is 1 if a build fails or misses a limit.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

import moec
from moec.artefact.engine_options import EngineOptions
from moec.spec.errors import MoecError
from moec.spec.model import ModelSpec
from moec.spec.presets import PRESETS

ROOT = Path(__file__).parents[1]
TINY = ROOT / "examples" / "tiny-scout"
HEADERS = ROOT / "tests/exporters/tensorrt_plugin/include"


@dataclass(frozen=True, slots=True)
class Row:
    """The figures of one build.

    `seconds` is the time from the call to the finished artefact. `peak` is the peak memory in bytes
    of the process that builds the engine, and `most` its limit.
    """

    build: str
    seconds: float
    limit: float
    engine: int = 0
    peak: int = 0
    most: float = 3e9
    layers: int = 0
    written: int = 0

    @property
    def holds(self) -> bool:
        """Whether the build is within its limits."""
        return self.seconds <= self.limit and self.peak <= self.most


def decoder(name: str, **changes: object) -> ModelSpec:
    spec = PRESETS[name]
    text = spec.text.model_copy(update=changes)
    return spec.model_copy(update={"text": text, "vision": None})


def two_layers(name: str) -> ModelSpec:
    return decoder(name, layers=2, attention="LG", rope="RN", qk_norm="Q-", temperature="-T")


def build(
    label: str, source: Any, limit: float, folder: Path, target: str = "tensorrt-rtx", **how: Any
) -> Row:
    start = time.perf_counter()
    art = moec.export(source, target=target, out=folder / "art", **how)
    took = time.perf_counter() - start
    parts = art.manifest.engines
    built = [each.built for each in parts.values()]
    return Row(
        label, took, limit, sum(each.size for each in built),
        max((each.peak_bytes for each in built), default=0),
        layers=sum(each.layers for each in built),
        written=art.manifest.build.bytes_written,
    )  # fmt: skip


def whole(folder: Path) -> Iterator[Row]:
    for name, precision, scheme in (
        ("scout", "bf16", None), ("scout", "fp8", "mixed"), ("maverick", "fp8", "mixed"),
    ):  # fmt: skip
        label = f"{name}, all layers, {'plugin' if scheme else precision}"
        yield build(label, decoder(name), 300, folder, precision=precision, scheme=scheme)


def rows(folder: Path) -> Iterator[Row]:
    for precision in ("bf16", "fp8"):
        yield build(f"tiny-scout, {precision}", TINY, 60, folder, precision=precision)
    for name in ("scout", "maverick"):
        for precision in ("bf16", "fp8"):
            label = f"{name}, two layers, {precision}"
            yield build(label, two_layers(name), 60, folder, precision=precision)
    plugin = two_layers("scout")
    yield build("scout, two layers, plugin", plugin, 60, folder, precision="fp8", scheme="mixed")
    one = decoder("scout", layers=1, attention="L", rope="R", qk_norm="Q", temperature="-")
    tower = one.model_copy(update={"vision": PRESETS["scout"].vision})
    yield build("scout, tower and one layer, bf16", tower, 60, folder, precision="bf16")
    only = EngineOptions(build=False)
    for name, scheme in (("scout", "mixed"), ("scout", "static"), ("maverick", "mixed")):
        label = f"{name}, all layers, ONNX only, fp8 {scheme}"
        yield build(
            label, name, 5, folder, "tensorrt", precision="fp8", scheme=scheme, options=only
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--full", action="store_true", help="also build whole decoders, which takes six minutes"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("TENSORRT_INCLUDE", str(HEADERS))
    table = Table(box=SIMPLE, title=f"{os.cpu_count()} cores")
    for column in ("build", "seconds", "limit", "engine", "peak", "limit", "layers", "written"):
        table.add_column(column, justify="left" if column == "build" else "right")
    found = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for row in (*rows(Path(folder)), *(whole(Path(folder)) if args.full else ())):
                found.append(row)
                print(row.build, f"{row.seconds:.1f} s", file=sys.stderr, flush=True)
                table.add_row(
                    row.build, f"{row.seconds:.1f}", f"{row.limit:.0f}",
                    f"{row.engine / 1e6:.1f} MB", f"{row.peak / 1e9:.2f} GB",
                    f"{row.most / 1e9:.0f} GB", f"{row.layers:,}", f"{row.written / 1e6:.1f} MB",
                )  # fmt: skip
        except MoecError as error:
            print(error, file=sys.stderr)
            sys.exit(error.exit_code)
    Console(width=130).print(table)
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in found], indent=1))
    sys.exit(0 if all(row.holds for row in found) else 1)


if __name__ == "__main__":
    main()
