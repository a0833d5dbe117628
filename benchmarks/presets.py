"""Compare the two sets of session options for ONNX Runtime: time, copied and mapped memory.

    python benchmarks/presets.py [--json FILE]

The script writes a seeded random model of 0.43 B parameters (bf16, 0.86 GB) to a temporary folder.
ONNX Runtime runs it in float32 with both sets of session options, and the eager reference runs it
too, each in its own process. "own" memory includes the weights that an engine copied. "mapped"
memory is pages of the shards, which processes share and the operating system can drop.
"""

import argparse
import json
import tempfile
from pathlib import Path

import moec
from moec.cli.tables import bench_table
from moec.runtime.bench.bench import Lane, race
from moec.spec.model import ModelSpec
from moec.spec.presets import PRESETS
from moec.weights.random import write_random_checkpoint

WAYS = (("onnxruntime", "lean"), ("onnxruntime", "fast"), ("eager", ""))


def model() -> ModelSpec:
    """A model like Scout, with 4 layers of width 1024 and 16 experts of width 2048."""
    scout = PRESETS["scout"]
    experts = scout.text.experts.model_copy(update={"hidden": 2048, "shared_hidden": 2048})
    sizes = {"layers": 4, "dim": 1024, "heads": 16, "kv_heads": 4, "head_dim": 64, "vocab": 8192}
    text = scout.text.model_copy(update={**sizes, "experts": experts})
    return scout.model_copy(
        update={"name": "random-0.4b", "provenance": "custom", "vision": None, "text": text}
    )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--json", type=Path)
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_random_checkpoint(model(), Path(folder, "weights"))
        artefact = moec.export(Path(folder, "weights"), out=Path(folder, "artefact"))
        report = moec.validate(artefact.path, tokens=24)
        lanes = [Lane(str(artefact.path), *way) for way in WAYS]
        rows = race(lanes, prompt_tokens=128, new_tokens=32)
    bench_table(rows)
    verdict = "PASSED" if report.passed else "FAILED"
    print(f"parity with the eager reference before timing: {verdict}")
    if options.json:
        options.json.write_text(json.dumps([row.to_dict() for row in rows], indent=1))
    if not report.passed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
