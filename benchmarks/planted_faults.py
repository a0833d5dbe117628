"""Plant faults in the files of artefacts, and count how many `validate` finds and names.

    python benchmarks/planted_faults.py [--target onnx|ort|weights|packed|int8] [--jobs N]

The script builds examples/tiny-scout for the target, unless it is given an artefact with its own
weights. It copies the artefact for each fault, plants the fault in a file of the copy, writes the
file's new hash into the manifest, and proves the copy. A row of the table says what was planted,
how much it changes what the artefact computes, whether the proof failed, and where it says that the
values first differ. Exit code 1: a fault changes nothing, is not found, or fewer than 9 of 10 are
named right, with their layer and op. The planter is in tests/planted and shares no code with moec.
"""

import argparse
import shutil
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import moec  # noqa: E402
from tests.one_thread import one_thread  # noqa: E402
from tests.planted.change import change, outputs  # noqa: E402
from tests.planted.fault import Fault, right_layer, right_op  # noqa: E402
from tests.planted.plant import planted  # noqa: E402
from tests.planted.table import GRAPH, WEIGHTS  # noqa: E402

TINY = ROOT / "examples" / "tiny-scout"
#: the share of faults that must be named right
NAMED = 0.9
#: the least relative change of an output that is no rounding: ten times what roundings change
LEAST = 1e-5
COLUMNS = (
    "fault",
    "layer",
    "op",
    "change",
    "in",
    "found",
    "first divergence",
    "layer?",
    "op?",
    "s",
)
#: what is built, by what --target says, and the faults that are planted in it
WAYS: dict[str, tuple[dict[str, str], tuple[Fault, ...]]] = {
    "onnx": ({"target": "onnx", "weights": "copy"}, GRAPH["onnx"]),
    "ort": ({"target": "ort", "weights": "copy"}, GRAPH["ort"]),
    "weights": ({"target": "onnx", "weights": "copy"}, WEIGHTS),
    "packed": ({"target": "ort", "weights": "pack"}, WEIGHTS),
    "int8": ({"target": "ort", "precision": "int8"}, WEIGHTS),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", choices=WAYS, action="append", help="default: all")
    parser.add_argument("--artefact", type=Path, help="an artefact with its own weights")
    parser.add_argument("--only", default="", help="faults with this word in their name or kind")
    parser.add_argument("--seed", type=int, default=3, help="the seed of the proofs")
    parser.add_argument("--no-proof", action="store_true", help="only measure what changes")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    given = parser.parse_args()
    bad = False
    for way in given.target or WAYS:
        built, faults = WAYS[way]
        chosen = [i for i, each in enumerate(faults) if given.only in f"{each.name} {each.kind}"]
        with tempfile.TemporaryDirectory(prefix="moec-planted-") as folder:
            artefact = given.artefact
            if artefact is None:
                artefact = moec.export(TINY, out=Path(folder) / "clean", **built).path
            bad |= report(way, artefact, chosen, Path(folder), given)
    sys.exit(bad)


def report(
    way: str, artefact: Path, chosen: list[int], folder: Path, given: argparse.Namespace
) -> bool:
    """Plant the faults of these numbers and print the table; whether the figures are too low."""
    faults = [WAYS[way][1][number] for number in chosen]
    table = Table(*COLUMNS, box=SIMPLE, padding=(0, 1, 0, 0), title=f"{way}: {len(faults)} faults")
    proof = not given.no_proof
    seed = given.seed if proof else None
    plant = partial(tried, way, artefact, outputs(artefact), folder, seed)
    seen: list[Tried] = []
    with ProcessPoolExecutor(given.jobs, get_context("spawn"), one_thread) as processes:
        for fault, each in zip(faults, processes.map(plant, chosen), strict=True):
            seen.append(each)
            row = [fault.name, fault.where, fault.at.split()[0], f"{each.change:.1e}", each.run]
            verdict = [said(each.found), each.named or "", said(each.layer), said(each.op)]
            row += verdict if proof else [""] * 4
            table.add_row(*row, f"{each.seconds:.0f}")
            print(f"{len(seen)}/{len(faults)} {row}", file=sys.stderr, flush=True)
    console = Console(width=170)
    console.print(table)
    count = len(faults)
    changed, found = sum(each.changed for each in seen), sum(each.found for each in seen)
    console.print(f"{way}: {changed} of {count} change an output")
    if not proof:
        return changed < count
    layers, ops = sum(each.layer for each in seen), sum(each.op for each in seen)
    console.print(f"{way}: {found} of {count} found; {layers} with the layer, {ops} with the op")
    return changed < count or found < count or ops < NAMED * count


class Tried(NamedTuple):
    """What came of one planted fault."""

    change: float  # relative, of an output
    run: str  # in which the output changed most
    named: str | None  # where the values first differ; None: the proof passed, or there was none
    layer: bool  # named right
    op: bool
    seconds: float

    @property
    def changed(self) -> bool:
        """Whether an output changed by more than roundings do."""
        return not self.change < LEAST  # NaN is a change

    @property
    def found(self) -> bool:
        """Whether the proof failed."""
        return self.named is not None


def tried(
    way: str,
    artefact: Path,
    clean: dict[str, Tensor],
    folder: Path,
    seed: int | None,
    number: int,  # the fault itself holds a closure, which no process can hand to another
) -> Tried:
    """Plant a fault in a copy of the artefact, and prove the copy unless `seed` is None."""
    start = perf_counter()
    fault = WAYS[way][1][number]
    copy = planted(artefact, fault, folder / str(number))
    amount, where = measured(clean, copy)
    named = None if seed is None else divergence(copy, seed)
    shutil.rmtree(copy)
    layer = named is not None and right_layer(fault, named)
    op = named is not None and right_op(fault, named)
    return Tried(amount, where, named, layer, op, perf_counter() - start)


def measured(clean: dict[str, Tensor], copy: Path) -> tuple[float, str]:
    """How much a fault changes what the artefact computes, and in which run."""
    try:
        return change(clean, outputs(copy))
    except moec.MoecError as error:
        return 0.0, f"refused: {error.found}"


def divergence(artefact: Path, seed: int) -> str | None:
    """Where a proof of the artefact says that the values first differ; None: it passed."""
    try:
        return moec.validate(artefact, seed=seed).first_divergence
    except moec.MoecError as error:
        return f"refused: {error.where}: {error.found}"


def said(right: bool) -> str:
    return "yes" if right else "NO"


if __name__ == "__main__":
    main()
