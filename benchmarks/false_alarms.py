"""Prove sound artefacts with many seeds, and count how often a proof fails.

    python benchmarks/false_alarms.py [--seeds 1000] [--commands 100] [--first 0]

First, `validate` runs in this process on small random models, each seed with other tokens, each
hundredth with other weights, for targets onnx and ort in turn. Then `moec validate` runs as a
command on examples/tiny-scout, built in seven ways in turn: FP8, int8 and int4 are among them. The
last line of each part has the number of proofs, of failures, and the largest share that a distance
had of its limit. Exit code 1: a proof failed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import moec  # noqa: E402
from moec.spec.presets import PRESETS  # noqa: E402
from moec.spec.reduced import reduced  # noqa: E402
from moec.weights.random import write_random_checkpoint  # noqa: E402

TINY = ROOT / "examples" / "tiny-scout"
SMALL: tuple[dict[str, str], ...] = ({"target": "onnx"}, {"target": "ort"})
WAYS: tuple[dict[str, str], ...] = (
    {"target": "onnx"},
    {"target": "ort"},
    {"target": "onnx", "precision": "fp8"},
    {"target": "onnx", "precision": "fp8", "scheme": "dynamic"},
    {"target": "ort", "precision": "int8"},
    {"target": "ort", "precision": "int4"},
    {"target": "onnx", "precision": "fp16"},
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="proofs in this process")
    parser.add_argument("--commands", type=int, default=100, help="runs of the command")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    given = parser.parse_args()
    seeds = range(given.first, given.first + given.seeds)
    commands = range(given.first, given.first + given.commands)
    with tempfile.TemporaryDirectory(prefix="moec-alarms-") as folder:
        failed = small_models(seeds, Path(folder)) if seeds else 0
        failed += whole_commands(commands, Path(folder)) if commands else 0
    sys.exit(bool(failed))


def small_models(seeds: range, folder: Path) -> int:
    """Prove small random models in this process; the number of proofs that failed."""
    spec = reduced(PRESETS["tiny-scout"], 4).model_copy(update={"vision": None})
    built: dict[str, Path] = {}
    seen = Seen("small models, one process")
    for seed in seeds:
        way = SMALL[seed % len(SMALL)]
        key = f"{seed // 100}-{way['target']}"
        if key not in built:
            weights = folder / f"weights-{seed // 100}"
            if not weights.exists():
                write_random_checkpoint(spec, weights, seed)
            built[key] = moec.export(weights, out=folder / key, **way).path
        seen.add(seed, way, moec.validate(built[key], seed=seed).to_dict())
    return seen.end()


def whole_commands(seeds: range, folder: Path) -> int:
    """Run `moec validate` on examples/tiny-scout; the number of runs that failed."""
    seen = Seen("moec validate, examples/tiny-scout")
    built = [moec.export(TINY, out=folder / str(i), **way).path for i, way in enumerate(WAYS)]
    for seed in seeds:
        at = seed % len(WAYS)
        command = [sys.executable, "-m", "moec", "validate", str(built[at]), "--seed", str(seed)]
        done = subprocess.run([*command, "--json"], capture_output=True, text=True, cwd=ROOT)
        seen.add(seed, WAYS[at], json.loads(done.stdout), done.returncode)
    return seen.end()


class Seen:
    """What came of the proofs of one part."""

    def __init__(self, title: str) -> None:
        self.title, self.proofs, self.failed = title, 0, 0
        self.nearest: Counter[str] = Counter()

    def add(self, seed: int, way: dict[str, str], report: dict[str, Any], code: int = 0) -> None:
        """Take in a report, and the exit code of the command that made it."""
        self.proofs += 1
        if code or not report["passed"]:
            self.failed += 1
            print(f"FAILED seed {seed}, {way}: {report['first_divergence']}", flush=True)
        for check in report["checks"]:
            if "each op" in check["name"] and check["found"] is not None and check["limit"]:
                op = check["detail"].rpartition(" ")[2]
                self.nearest[op] = max(self.nearest[op], check["found"] / check["limit"])

    def end(self) -> int:
        """Print the line of this part; the number of proofs that failed."""
        near = ", ".join(f"{op} {share:.2f}" for op, share in self.nearest.most_common(5))
        counts = f"{self.proofs} proofs, {self.failed} failed"
        print(f"{self.title}: {counts}; nearest to its limit: {near}")
        return self.failed


if __name__ == "__main__":
    main()
