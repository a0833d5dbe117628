"""Prove sound artefacts with many seeds, and count how often a proof fails.

    python benchmarks/false_alarms.py [--seeds 1000] [--commands 100] [--first 0] [--jobs N]

First, `validate` runs on small random models, many seeds in a process: each seed has other tokens,
each twenty-fifth other weights, and targets onnx and ort take turns. Then `moec validate` runs as a
command on examples/tiny-scout, built in seven ways in turn: FP8, int8 and int4 are among them. The
last line of each part has the number of proofs, of failures, and the largest share that a distance
had of its limit. A line tells of each twenty-fifth proof. Exit code 1: a proof failed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import moec  # noqa: E402
from moec.spec.presets import PRESETS  # noqa: E402
from moec.spec.reduced import reduced  # noqa: E402
from moec.weights.random import write_random_checkpoint  # noqa: E402
from tests.one_thread import one_thread  # noqa: E402

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
#: seeds that share weights, and proofs between two lines of progress
BLOCK = 25
#: `moec`, with one thread as the processes beside it
COMMAND = (
    "from tests.one_thread import one_thread; one_thread(); from moec.__main__ import main; main()"
)


class Proof(NamedTuple):
    """What came of one proof."""

    seed: int
    way: dict[str, str]
    failure: str | None
    nearest: dict[str, float]  # the largest share that a distance had of its limit, for each op


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="proofs of small models")
    parser.add_argument("--commands", type=int, default=100, help="runs of the command")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    given = parser.parse_args()
    seeds = range(given.first, given.first + given.seeds)
    commands = range(given.first, given.first + given.commands)
    context = get_context("spawn")
    with (
        tempfile.TemporaryDirectory(prefix="moec-alarms-") as name,
        ProcessPoolExecutor(given.jobs, context, one_thread) as processes,
    ):
        folder = Path(name)
        failed = counted("small models", small_models(seeds, folder, processes))
        failed += counted("moec validate, tiny-scout", commands_of(commands, folder, processes))
    sys.exit(bool(failed))


def small_models(seeds: range, folder: Path, processes: Executor) -> Iterator[Proof]:
    """Prove small random models, a block of seeds in each call of a process."""
    blocks = [seeds[at : at + BLOCK] for at in range(0, len(seeds), BLOCK)]
    for done in as_completed([processes.submit(one_block, block, folder) for block in blocks]):
        yield from done.result()


def one_block(seeds: range, folder: Path) -> list[Proof]:
    """Build one model for each target, and prove it with these seeds, all in this process."""
    spec = reduced(PRESETS["tiny-scout"], 4).model_copy(update={"vision": None})
    weights = folder / f"weights-{seeds[0]}"
    write_random_checkpoint(spec, weights, seeds[0])
    built = [
        moec.export(weights, out=folder / f"{seeds[0]}-{way['target']}", **way).path
        for way in SMALL
    ]
    proofs = []
    for seed in seeds:
        at = seed % len(SMALL)
        proofs.append(proof(seed, SMALL[at], moec.validate(built[at], seed=seed).to_dict()))
    return proofs


def commands_of(seeds: range, folder: Path, processes: Executor) -> Iterator[Proof]:
    """Run `moec validate` on examples/tiny-scout."""
    if not seeds:
        return
    built = list(processes.map(partial(build, folder), range(len(WAYS))))
    calls = [processes.submit(one_command, seed, built[seed % len(WAYS)]) for seed in seeds]
    for done in as_completed(calls):
        yield done.result()


def build(folder: Path, at: int) -> Path:
    return moec.export(TINY, out=folder / str(at), **WAYS[at]).path


def one_command(seed: int, built: Path) -> Proof:
    command = [sys.executable, "-c", COMMAND, "validate", str(built), "--seed", str(seed), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    way = WAYS[seed % len(WAYS)]
    if done.returncode not in (0, 1):
        return Proof(seed, way, f"exit code {done.returncode}: {done.stderr[-300:]}", {})
    return proof(seed, way, json.loads(done.stdout))


def proof(seed: int, way: dict[str, str], report: dict[str, Any]) -> Proof:
    """What a report of `validate` says."""
    nearest: Counter[str] = Counter()
    for check in report["checks"]:
        if "each op" in check["name"] and check["found"] is not None and check["limit"]:
            op = check["detail"].rpartition(" ")[2]
            nearest[op] = max(nearest[op], check["found"] / check["limit"])
    failure = None if report["passed"] else str(report["first_divergence"])
    return Proof(seed, way, failure, dict(nearest))


def counted(title: str, proofs: Iterable[Proof]) -> int:
    """Print what came of these proofs; the number of failures."""
    count, failed = 0, 0
    nearest: Counter[str] = Counter()
    for each in proofs:
        count += 1
        if each.failure is not None:
            failed += 1
            print(f"FAILED seed {each.seed}, {each.way}: {each.failure}", flush=True)
        for op, share in each.nearest.items():
            nearest[op] = max(nearest[op], share)
        if count % BLOCK == 0:
            print(f"{title}: {count} proofs, {failed} failed", flush=True)
    near = ", ".join(f"{op} {share:.2f}" for op, share in nearest.most_common(5))
    print(f"{title}: {count} proofs, {failed} failed; nearest to its limit: {near}", flush=True)
    return failed


if __name__ == "__main__":
    main()
