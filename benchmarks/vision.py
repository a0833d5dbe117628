"""Time the vision tower at full size on the CPU, and compare with transformers and a limit.

    python benchmarks/vision.py [--tiles 1 4] [--json FILE]

The weights are random: 871,932,416 parameters of tower and projector, 1.7 GB in bfloat16. The
arithmetic is float32. Each engine runs in its own process, and its first call is not timed. The
limit is the rate of a large float32 matrix product in torch, measured in the same run.
"""

import argparse
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fresh_process import call
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from moec.spec.model import ModelSpec
from moec.spec.plan import plan
from moec.spec.presets import PRESETS

Figures = dict[str, float]
REPEATS = 2


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tiles", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE too")
    options = parser.parse_args()
    console, rows = Console(width=100), []
    with tempfile.TemporaryDirectory(prefix="moec-benchmark-") as name:
        with console.status("writing weights"):
            call(prepare, name)
        limit = call(matrix_product).value
        for engine, run in ENGINES.items():
            with console.status(engine):
                outcome = call(measure, run, name, options.tiles)
            if outcome.error:
                rows.append({"engine": engine, "error": outcome.error})
                continue
            rows += [
                {"engine": engine, "peak_gb": outcome.peak_bytes / 1e9, **row}
                for row in outcome.value
            ]
        errors = call(differences, name).value
    console.print(table(rows, limit, errors))
    if options.json:
        machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
        data = {"machine": machine, "limit_flops": limit, "rows": rows, "errors": errors}
        options.json.write_text(json.dumps(data, indent=1), encoding="utf-8")
    return int(any("error" in row for row in rows))


def spec() -> ModelSpec:
    """Scout's vision tower and projector at full size, with a decoder of one small layer."""
    scout = PRESETS["scout"]
    text = scout.text.model_copy(
        update={
            "layers": 1, "heads": 8, "kv_heads": 8, "head_dim": 8, "vocab": 256,
            "experts": scout.text.experts.model_copy(
                update={"count": 1, "hidden": 8, "shared_hidden": 8}
            ),
            "attention": "L", "rope": "R", "qk_norm": "Q", "temperature": "-",
        }
    )  # fmt: skip
    tokens = scout.tokens.model_copy(
        update={"image": 7, "image_start": 5, "image_end": 6, "bos": 0, "eos": (1,), "pad": 2}
    )
    return scout.model_copy(update={"name": "full-size-tower", "text": text, "tokens": tokens})


def prepare(folder: str) -> None:
    """Write a random checkpoint and an artefact of it."""
    import moec
    from moec.weights.random import write_random_checkpoint

    write_random_checkpoint(spec(), Path(folder, "weights"))
    moec.export(Path(folder, "weights"), out=Path(folder, "artefact"))


Run = Callable[[int], Any]


def moec_engine(folder: str, engine: str, preset: str = "lean") -> Run:
    """Open the vision tower in a session."""
    import moec

    session = moec.open_session(Path(folder, "artefact"), engine=engine, session_options=preset)
    return lambda tiles: session.image_features(pixels(tiles))


def onnxruntime_lean(folder: str) -> Run:
    return moec_engine(folder, "onnxruntime")


def onnxruntime_fast(folder: str) -> Run:
    return moec_engine(folder, "onnxruntime", "fast")


def eager(folder: str) -> Run:
    return moec_engine(folder, "eager")


def transformers(folder: str) -> Run:
    """Open the peer's tower and projector, in float32 with torch's SDPA."""
    import torch

    from moec.runtime.bench.torchvision_ops import declare_torchvision_ops

    declare_torchvision_ops()
    from transformers import Llama4ForConditionalGeneration

    model = Llama4ForConditionalGeneration.from_pretrained(
        Path(folder, "weights"), dtype=torch.float32, attn_implementation="sdpa"
    ).eval()

    @torch.inference_mode()
    def run(tiles: int) -> torch.Tensor:
        seen = model.vision_model(pixels(tiles)).last_hidden_state
        return model.multi_modal_projector(seen).flatten(0, 1)

    return run


ENGINES = {
    "onnxruntime, lean": onnxruntime_lean,
    "onnxruntime, fast": onnxruntime_fast,
    "eager": eager,
    "transformers": transformers,
}


def pixels(tiles: int) -> Any:
    import torch

    return torch.rand(tiles, 3, 336, 336, generator=torch.Generator().manual_seed(tiles)) * 2 - 1


def measure(make: Callable[[str], Run], folder: str, tiles: list[int]) -> list[Figures]:
    """The seconds to open an engine, and to run each number of image tiles."""
    import numpy as np

    start = time.perf_counter()
    run = make(folder)
    features = run(1)
    opened = time.perf_counter() - start
    np.save(Path(folder, f"{make.__name__}.npy"), features)
    rows: list[Figures] = []
    for count in tiles:
        times = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            run(count)
            times.append(time.perf_counter() - start)
        rows.append({"tiles": count, "first_s": opened, "run_s": min(times)})
    return rows


def differences(folder: str) -> dict[str, float]:
    """Each engine's largest difference from transformers, divided by the largest value."""
    import numpy as np

    expected = np.load(Path(folder, f"{transformers.__name__}.npy"))
    found = {name: np.load(Path(folder, f"{run.__name__}.npy")) for name, run in ENGINES.items()}
    return {
        name: float(abs(each - expected).max() / abs(expected).max())
        for name, each in found.items()
    }


def matrix_product(size: int = 4096) -> float:
    """The FLOP/s of a square float32 matrix product."""
    import torch

    a, b = torch.rand(size, size), torch.rand(size, size)
    best = math.inf
    for _ in range(8):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def table(rows: list[Figures], limit: float, errors: dict[str, float] | None) -> Table:
    """A table of the engines' figures."""
    result = Table(box=SIMPLE, padding=0, caption=f"limit: {limit / 1e9:.0f} GFLOP/s")
    for head in (
        "engine",
        "tiles",
        "first\ns",
        "run\ns",
        "s/tile",
        "of\nlimit",
        "peak\nGB",
        "error",
    ):
        result.add_column(head, justify="left" if head == "engine" else "right", no_wrap=True)
    for row in rows:
        if "error" in row:
            result.add_row(str(row["engine"]), str(row["error"]), style="red")
            continue
        share = plan(spec(), "fp32", tiles=int(row["tiles"])).vision_flops / row["run_s"] / limit
        result.add_row(
            str(row["engine"]), f"{row['tiles']}", f"{row['first_s']:.1f}", f"{row['run_s']:.2f}",
            f"{row['run_s'] / row['tiles']:.2f}", f"{share:.0%}", f"{row['peak_gb']:.1f}",
            f"{(errors or {}).get(str(row['engine']), math.nan):.0e}",
        )  # fmt: skip
    return result


if __name__ == "__main__":
    sys.exit(main())
