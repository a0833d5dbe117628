"""Build every target twice in different surroundings, and compare the artefacts byte for byte.

    python benchmarks/deterministic.py [--only NAME]

The two builds differ in the seed of Python's hashes, the number of threads, the working folder, the
time zone, the locale and the folder of the artefact. They run through the command line, and prove
nothing: a proof draws a fresh seed. TensorRT engines are not built, because TensorRT chooses their
kernels by timing them. The exit code is 1 if any file differs.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
TINY = ("--checkpoint", str(ROOT / "examples" / "tiny-scout"))
#: the name of a build -> its options
BUILDS: dict[str, tuple[str, ...]] = {
    "onnx": TINY,
    "onnx, copied": (*TINY, "--weights", "copy"),
    "onnx, linked and hashed": (*TINY, "--weights", "link", "--hash"),
    "onnx fp16": (*TINY, "--precision", "fp16"),
    "onnx fp8": (*TINY, "--precision", "fp8"),
    "onnx, unbound Scout": ("--variant", "scout"),
    "ort": (*TINY, "--target", "ort"),
    "ort bf16": (*TINY, "--target", "ort", "--precision", "bf16"),
    "ort int8": (*TINY, "--target", "ort", "--precision", "int8"),
    "ort int4": (*TINY, "--target", "ort", "--precision", "int4"),
    "ort, unbound Scout": ("--variant", "scout", "--target", "ort"),
    "torch fp8": (*TINY, "--target", "torch"),
    "tensorrt": (*TINY, "--target", "tensorrt", "--no-engine"),
    "tensorrt fp8": (*TINY, "--target", "tensorrt", "--precision", "fp8", "--no-engine"),
    "tensorrt-rtx": (*TINY, "--target", "tensorrt-rtx", "--no-engine"),
}
#: two surroundings: the folder that the build runs in, and variables of its environment
SURROUNDINGS = (
    ("one", {"PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1", "LC_ALL": "C", "TZ": "UTC"}),
    (
        "another/below",
        {
            "PYTHONHASHSEED": "77",
            "OMP_NUM_THREADS": "2",
            "LC_ALL": "C.UTF-8",
            "TZ": "Asia/Tokyo",
            "COLUMNS": "40",
        },
    ),
)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--only", choices=BUILDS, action="append")
    only = arguments.parse_args().only or list(BUILDS)
    table = Table(box=SIMPLE)
    for column in ("build", "files", "bytes", "differ"):
        table.add_column(column, justify="left" if column in ("build", "differ") else "right")
    differ = 0
    with tempfile.TemporaryDirectory() as scratch:
        for number, name in enumerate(only):
            first, second = (
                _build(Path(scratch) / f"{number}-{i}", folder, variables, BUILDS[name])
                for i, (folder, variables) in enumerate(SURROUNDINGS)
            )
            odd = sorted(n for n in first.keys() | second.keys() if first.get(n) != second.get(n))
            differ += len(odd)
            total = sum(map(len, first.values()))
            table.add_row(name, str(len(first)), f"{total:,}", ", ".join(odd) or "none")
    console = Console(width=110)
    console.print(table)
    console.print(f"{len(only)} builds, each twice: {differ} files differ")
    sys.exit(1 if differ else 0)


def _build(
    folder: Path, below: str, variables: dict[str, str], options: tuple[str, ...]
) -> dict[str, bytes]:
    """Build in a process of its own; return the files of the artefact by name."""
    here = folder / below
    here.mkdir(parents=True)
    # Both artefacts lie in the same depth, because genai's configuration holds a relative path.
    command = [sys.executable, "-m", "moec", "build", "--no-validate", "--out", str(folder / "a")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), **variables}
    done = subprocess.run(
        [*command, *options], cwd=here, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(options)}: {done.stderr}")
    out = folder / "a"
    files = (each for each in sorted(out.rglob("*")) if each.is_file())
    return {each.relative_to(out).as_posix(): each.read_bytes() for each in files}


if __name__ == "__main__":
    main()
