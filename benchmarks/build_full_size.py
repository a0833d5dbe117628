"""Build Scout, Maverick and DeepSeek-V3 at full size, and measure seconds, memory and bytes.

    python benchmarks/build_full_size.py [--no-peer] [--models NAME ...] [--json FILE]

The script builds Scout and Maverick in four ways, and DeepSeek-V3 in three. Each build runs in a
new process, and the clock starts after its imports:

- `by moec`: from a preset to a checked ONNX model, without weights;
- `by moec, weights`: from a checkpoint of full size, with weights left in place. The checkpoint has
  sparse files: 217 and 803 GB that take no room on the disk. The bytes that the build reads and
  writes show that it reads and copies no weight;
- `ort, weights`: the same for target ort, with decoder, vision tower and genai's graph. Its limits
  are 5 and 10 s in total, and 1 GB;
- `W4A16` and `W4A16, ort` (Scout alone): 4-bit integers with zero points in groups of 128, from a
  sparse checkpoint in place for target onnx, and without weights for target ort. Their limits are
  10 s in total, and 1 GB;
- `weightless`, `FP8 in place` and `FP8 by bind` (DeepSeek-V3 alone): from the preset; from a sparse
  checkpoint in block FP8, with 45,000 tensors of experts and as many of scales; and the same
  weights bound to an artefact that was built without. The limits are 5 s and 0.8 GB, and 15 s and
  1.5 GB. Proofs are no part of it;
- `by torch.onnx`: the peer, torch's own exporter, without weights; see benchmarks/torch_export.py.

The exit code is 1 if a build by moec fails or misses a limit.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from fresh_process import call
from quantize import INTEGERS
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from sparse_checkpoint import bytes_on_disk, write_sparse_checkpoint

from moec import export, load_spec
from moec.artefact.manifest import Manifest
from moec.spec.hf.quantization import read_scheme
from moec.spec.model import ModelSpec
from moec.spec.presets import PRESETS

VARIANTS = ("scout", "maverick")
#: the model of many experts, each with tensors of its own
MANY = "deepseek-v3"
INT4, INT4_ORT = "W4A16", "W4A16, ort"
WEIGHTLESS, IN_PLACE, BIND = "weightless", "FP8 in place", "FP8 by bind"
BARE, BOUND, ORT, PEER = "by moec", "by moec, weights", "ort, weights", "by torch.onnx"
#: limits of a build by moec; MB and GB are decimal
PLAIN = {"graph_s": 3.0, "onnx_s": 3.0, "peak_gb": 0.6, "written_mb": 20.0}
SHORT = {"total_s": 10.0, "peak_gb": 1.0}
FP8 = {"total_s": 15.0, "peak_gb": 1.5}
LIMITS = {BARE: PLAIN, BOUND: PLAIN, ORT: {"peak_gb": 1.0}, INT4: SHORT, INT4_ORT: SHORT, PEER: {}}
LIMITS |= {WEIGHTLESS: {"total_s": 5.0, "peak_gb": 0.8}, IN_PLACE: FP8, BIND: FP8}
#: what DeepSeek publishes in config.json
BLOCKS = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
#: limits of the total seconds for target ort, whose graph has a branch for each expert
ORT_TOTAL_S = {"scout": 5.0, "maverick": 10.0}

Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Row:
    """The figures of one build. A figure is None if the build failed or has no such figure."""

    model: str
    build: str
    error: str = ""
    graph_s: float | None = None
    onnx_s: float | None = None
    total_s: float | None = None
    peak_gb: float | None = None
    read_mb: float | None = None
    written_mb: float | None = None
    weights_gb: float | None = None

    def missed(self) -> list[str]:
        """The names of the limits that this build misses. The peer has no limits."""
        limits = LIMITS[self.build]
        if self.build == ORT:
            limits = {**limits, "total_s": ORT_TOTAL_S[self.model]}
        figures = {name: getattr(self, name) for name in limits}
        return [name for name, x in figures.items() if x is None or x >= limits[name]]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--no-peer", action="store_true", help="leave torch.onnx out")
    models = (*VARIANTS, MANY)
    parser.add_argument("--models", nargs="+", choices=models, default=models, metavar="NAME")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE too")
    options = parser.parse_args()
    console = Console()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="moec-benchmark-") as folder:
        for model in options.models:
            with console.status(f"building {model}"):
                if model == MANY:
                    rows += builds_of_many(Path(folder))
                else:
                    rows += builds(model, Path(folder), not options.no_peer, console)
    console.print(table(rows))
    if not options.no_peer:
        console.print("\n".join(ratios(rows)), highlight=False)
    missed = {f"{row.model} {row.build}": row.missed() for row in rows if row.missed()}
    for build, limits in missed.items():
        console.print(f"[red]{build} misses {', '.join(limits)}")
    if options.json:
        machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
        data: dict[str, object] = {
            "machine": machine,
            "python": platform.python_version(),
            "limits": LIMITS,
        }
        data |= {"missed": missed, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(data, indent=1), encoding="utf-8")
    return int(bool(missed))


def builds(variant: str, folder: Path, peer: bool, console: Console) -> Iterator[Row]:
    """Build `variant` in each way, in folders below `folder`."""
    yield measure(variant, BARE, moec_build, variant, folder / f"{variant}-bare")
    checkpoint = folder / f"{variant}-checkpoint"
    size = write_sparse_checkpoint(PRESETS[variant], checkpoint)
    console.print(
        f"{variant}: the checkpoint has {size / 1e9:.1f} GB and takes "
        f"{bytes_on_disk(checkpoint) / 1e6:.1f} MB on the disk",
        highlight=False,
    )
    yield measure(variant, BOUND, moec_build, checkpoint, folder / f"{variant}-bound")
    yield measure(variant, ORT, ort_build, checkpoint, folder / f"{variant}-ort")
    if variant == "scout":
        integers = folder / "integers"
        scheme = INTEGERS["int4-zeros"]
        write_sparse_checkpoint(PRESETS[variant].model_copy(update={"scheme": scheme}), integers)
        yield measure(variant, INT4, moec_build, integers, folder / "integers-onnx")
        yield measure(variant, INT4_ORT, unbound_build, integers, folder / "integers-ort")
    if peer:
        yield measure(variant, PEER, torch_build, variant, folder / f"{variant}.onnx")


def builds_of_many(folder: Path) -> Iterator[Row]:
    """Build DeepSeek-V3 in each way, in folders below `folder`."""
    yield measure(MANY, WEIGHTLESS, moec_build, MANY, folder / "many-bare")
    spec, checkpoint = PRESETS[MANY], folder / "many-checkpoint"
    scheme = read_scheme(BLOCKS, Path("config.json"), spec)
    write_sparse_checkpoint(spec.model_copy(update={"scheme": scheme}), checkpoint, 5 * 10**9)
    yield measure(MANY, IN_PLACE, moec_build, checkpoint, folder / "many-bound")
    unbound = folder / "many-unbound"
    export(load_spec(checkpoint), target="onnx", out=unbound)
    yield measure(MANY, BIND, bind_to, f"{unbound}:{checkpoint}", folder / "many-bind")


def measure(
    model: str, build: str, function: Callable[[str, str], Figures], source: object, out: Path
) -> Row:
    """Call `function` in a new process, and return its figures."""
    outcome = call(function, str(source), str(out))
    if outcome.error:
        return Row(model, build, outcome.error)
    return Row(model, build, peak_gb=outcome.peak_bytes / 1e9, **outcome.value)


def ort_build(source: str, out: str) -> Figures:
    """Like `moec_build`, for target ort."""
    return moec_build(source, out, "ort")


def bind_to(source: str, out: str) -> Figures:
    """Bind "ARTEFACT:CHECKPOINT". It runs in its own process."""
    from moec import bind

    artefact, _, checkpoint = source.partition(":")
    return measured(lambda: bind(artefact, checkpoint, out).manifest)


def unbound_build(source: str, out: str) -> Figures:
    """Build for target ort from the config in `source` alone."""
    from moec import load_spec

    return moec_build(load_spec(source), out, "ort")


def moec_build(source: str | ModelSpec, out: str, target: str = "onnx") -> Figures:
    """Build a preset, a checkpoint folder or a spec. It runs in its own process."""
    from moec import export

    return measured(lambda: export(source, target=target, out=out).manifest)


def measured(build: Callable[[], Manifest]) -> Figures:
    """The figures of a build; the clock starts after its imports."""
    from moec.exporters.builder import builder_of

    builder_of("onnx")  # imports it
    before, start = traffic(), time.perf_counter()
    built = build()
    total, after = time.perf_counter() - start, traffic()
    seconds = built.build.seconds
    return {
        "graph_s": seconds.get("graph", 0.0),
        "onnx_s": sum(seconds[stage] for stage in seconds.keys() - {"read", "graph"}),
        "total_s": total,
        "read_mb": (after["rchar"] - before["rchar"]) / 1e6,
        "written_mb": (after["wchar"] - before["wchar"]) / 1e6,
        "weights_gb": sum(each.length for each in built.weights.tensors.values()) / 1e9,
    }


def torch_build(variant: str, out: str) -> Figures:
    """Export the preset `variant` with torch. It runs in its own process."""
    from torch_export import export

    seconds = export(variant, out)
    written = Path(out).stat().st_size / 1e6
    return {**seconds, "total_s": sum(seconds.values()), "written_mb": written}


def traffic() -> dict[str, int]:
    """The bytes that system calls of this process have read and written so far, in all files."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return {name: int(count) for name, count in (line.split(": ") for line in lines)}


def table(rows: list[Row]) -> Table:
    """A table of `rows`, with limits in the column heads and errors below the table."""
    heads = {
        "graph_s": "graph\ns", "onnx_s": "ONNX\ns", "total_s": "total\ns", "peak_gb": "peak\nGB",
        "read_mb": "read\nMB", "written_mb": "written\nMB", "weights_gb": "weights\nGB",
    }  # fmt: skip
    failed = [f"{row.model} {row.build}: {escape(row.error)}" for row in rows if row.error]
    result = Table(box=SIMPLE, padding=0, caption="\n".join(failed) or None, caption_justify="left")
    result.add_column("build", no_wrap=True)
    for name, head in heads.items():
        limit = f"\n< {PLAIN[name]:g}" if name in PLAIN else ""
        result.add_column(head + limit, justify="right", no_wrap=True)
    for row in rows:
        figures = {name: getattr(row, name) for name in heads}
        cells = [f"{x:.3g}" if x else "failed" if row.error else "-" for x in figures.values()]
        marks = ["[red]" if name in row.missed() else "" for name in heads]
        marked = (mark + cell for mark, cell in zip(marks, cells, strict=True))
        result.add_row(f"{row.model} {row.build}", *marked, style="red" if row.error else None)
    return result


def ratios(rows: list[Row]) -> Iterator[str]:
    """For each model, the peer's time and memory divided by those of `by moec`."""
    by_name = {(row.model, row.build): row for row in rows}
    for model in {row.model for row in rows} & {*VARIANTS}:
        ours, peer = by_name[model, BARE], by_name[model, PEER]
        if ours.total_s and ours.peak_gb and peer.total_s and peer.peak_gb:
            slower, larger = peer.total_s / ours.total_s, peer.peak_gb / ours.peak_gb
            yield f"{model}: torch.onnx takes {slower:.0f}x the time and {larger:.1f}x the memory"
        else:
            yield f"{model}: no ratio, a build failed"


if __name__ == "__main__":
    sys.exit(main())
