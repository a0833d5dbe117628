"""Let processes build, bind, read and record one artefact at once: 24 races, each some rounds.

    python benchmarks/races.py [--rounds 3] [--only NUMBER]

Before each round the place of the artefact holds an older one, and in some races also what killed
builds left beside it. The processes of a race start at the same moment. Whoever reads must see the
older artefact or a new one, whole, or get one clear message; so must whoever writes. Afterwards the
place must hold one whole artefact that one of them wrote, and the next build must leave nothing
else. The exit code is 1 if one of these is not so.
"""

import argparse
import hashlib
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime  # noqa: F401  before anything is forked
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

import moec
from moec.artefact.artefact import open_artefact, verify_files
from moec.artefact.parity import identity, record
from moec.runtime.engines import ort  # noqa: F401  likewise
from moec.runtime.proof.report import Check, Report
from moec.spec.errors import MoecError, clear_errors
from moec.spec.presets import PRESETS
from moec.spec.reduced import reduced
from moec.weights.packed.journal import PACKED
from moec.weights.random import write_random_checkpoint

IDS = torch.tensor([[5, 6, 7, 8]])
#: how long readers read
SECONDS = 1.5


@dataclass(frozen=True)
class Place:
    """Two checkpoints of one model, and where the artefact is."""

    first: Path
    second: Path
    out: Path


def _open(place: Place) -> str:
    """What the artefact computes, as a hash."""
    logits = moec.open_session(place.out).logits(IDS)
    return hashlib.sha256(logits.numpy().tobytes()).hexdigest()


@clear_errors  # as around each command
def _verify(place: Place) -> str:
    verify_files(open_artefact(place.out))
    return "whole"


def _record(place: Place) -> str:
    check = Check("layers.0", "error", 0.0, 1e-4)
    report = Report(str(place.out), "x", "eager fp32", "fp32", 1, [4], checks=[check])
    report.identity = identity(open_artefact(place.out))
    record(place.out, report)
    return "recorded"


def _written(build: Callable[[Place], object]) -> Callable[[Place], str]:
    def write(place: Place) -> str:
        build(place)
        return "written"

    return write


#: what a process does
ACTIONS: dict[str, Callable[[Place], str]] = {
    "open": _open,
    "verify": _verify,
    "record": _record,
    "build old": _written(lambda p: moec.export(p.first, out=p.out, weights="copy")),
    "build": _written(lambda p: moec.export(p.second, out=p.out, weights="copy")),
    "pack": _written(lambda p: moec.export(p.second, precision="fp8", out=p.out)),
    "link": _written(lambda p: moec.export(p.second, out=p.out, weights="link")),
    "in place": _written(lambda p: moec.export(p.second, out=p.out)),
    "bind": _written(lambda p: moec.bind(p.out, p.second, weights="copy")),
    "bind from": _written(lambda p: moec.bind(p.out, p.second, p.out.parent / "other")),
}
#: those that repeat until their time is up; the others run once
READERS = ("open", "verify", "record")
LEFT = "leftovers of killed builds"
RACES: tuple[tuple[str, ...], ...] = (
    ("build", "open"),
    ("build", "verify"),
    ("pack", "open"),
    ("pack", "verify"),
    ("link", "open"),
    ("in place", "open"),
    ("bind", "open"),
    ("bind", "verify"),
    ("build", "build"),
    ("build", "build old"),
    ("build", "pack"),
    ("pack", "pack"),
    ("build", "bind"),
    ("bind", "bind"),
    ("build", "bind from"),
    ("pack", "bind from", "open"),
    ("record", "record"),
    ("record", "build"),
    ("record", "bind"),
    ("record", "open", "verify"),
    ("record", "build", "open"),
    ("build", "open", LEFT),
    ("pack", "pack", LEFT),
    ("build", "pack", "bind", "record", "open", LEFT),
)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--only", type=int, action="append", help="a race, from 1")
    given = arguments.parse_args()
    torch.set_num_threads(1)
    chosen = given.only or range(1, len(RACES) + 1)
    table = Table(box=SIMPLE)
    for column in ("", "race", "written", "whole reads", "records", "messages", "wrong"):
        table.add_column(column, justify="left" if column == "race" else "right")
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(prefix="moec-races-") as scratch:
        folder = Path(scratch)
        spec = reduced(PRESETS["tiny-scout"])
        for seed, name in enumerate(("first", "second")):
            write_random_checkpoint(spec, folder / name, seed)
        known = _known(folder)
        for number in chosen:
            names, count, odd = RACES[number - 1], Counter[str](), list[str]()
            for round_ in range(given.rounds):
                place = Place(folder / "first", folder / "second", folder / "work" / "art")
                found, problems = _race(place, names, known, folder / "old")
                count.update(found)
                odd += [f"race {number}, round {round_ + 1}: {each}" for each in problems]
            wrong += odd
            cells = (count[each] for each in ("written", "whole", "recorded", "message"))
            row = (str(number), " + ".join(names), *map(str, cells), str(len(odd)))
            table.add_row(*row, style="red" if odd else None)
    console = Console(width=110)
    for each in wrong:
        console.print(each, markup=False)
    console.print(table)
    console.print(f"{len(chosen)} races, {given.rounds} rounds each: {len(wrong)} wrong")
    sys.exit(bool(wrong))


def _known(folder: Path) -> set[str]:
    """What whole artefacts compute. The older artefact is left in `folder`/old."""
    known = set()
    for name in ("build old", "build", "pack"):
        place = Place(folder / "first", folder / "second", folder / name)
        ACTIONS[name](place)  # imports all there is, before anything is forked
        known.add(_in_child(_open, place))
    (folder / "build old").rename(folder / "old")
    return known


def _in_child(action: Callable[[Place], str], place: Place) -> str:
    """Run an action in a forked process, because ONNX Runtime's threads do not survive a fork."""
    context = multiprocessing.get_context("fork")
    with context.Pool(1) as pool:
        return pool.apply(action, (place,))


def _race(
    place: Place, names: tuple[str, ...], known: set[str], old: Path
) -> tuple[Counter[str], list[str]]:
    """One round: how often each outcome came, and what was wrong."""
    work = place.out.parent
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(old, place.out)
    actors = [name for name in names if name != LEFT]
    if LEFT in names:
        _leave(place)
    context = multiprocessing.get_context("fork")
    start, answers = context.Barrier(len(actors)), context.SimpleQueue()
    processes = [
        context.Process(target=_act, args=(name, place, start, answers)) for name in actors
    ]
    for each in processes:
        each.start()
    outcomes = [answers.get() for _ in processes]
    for each in processes:
        each.join()
    count, problems = Counter[str](), list[str]()
    for name, outcome in outcomes:
        for what, times in outcome.items():
            kind, _, detail = what.partition(": ")
            kind = "whole" if kind in known else kind
            if kind not in ("written", "whole", "recorded", "message"):
                problems.append(f"{name}: {detail or 'other numbers than any artefact has'}")
            count[kind] += times
    try:
        if _in_child(_open, place) not in known:
            problems.append("the artefact that was left computes other numbers")
        not_hashed = verify_files(open_artefact(place.out)).not_hashed
        if any("did not write" in each for each in not_hashed):
            problems.append(f"left in the artefact: {not_hashed}")
    except MoecError as error:
        problems.append(f"no whole artefact was left: {error.where}: {error.found}")
    moec.export(place.second, out=place.out, weights="copy")
    left = {each.name for each in work.iterdir()} - {"art", "other"}
    if left:
        problems.append(f"left beside the artefact after the next build: {left}")
    return count, problems


def _leave(place: Place) -> None:
    """Leave beside the artefact what builds leave that are killed."""
    process = multiprocessing.get_context("fork").Process(target=int)
    process.start()
    process.join()
    for kind in ("partial", "replaced"):
        folder = place.out.parent / f".{place.out.name}.moec-{kind}-{process.pid}"
        folder.mkdir()
        (folder / "model.onnx").write_text("half")
        (folder / PACKED).write_bytes(b"half")
        (folder / f"{PACKED}.journal").write_text("of another build\nhalf\n")


def _act(name: str, place: Place, start: Any, answers: Any) -> None:
    """The body of a process: act, once or for a while, and count what came of it."""
    found = Counter[str]()
    start.wait()
    end = time.monotonic() + (SECONDS if name in READERS else 0)
    while not found or time.monotonic() < end:
        try:
            found[ACTIONS[name](place)] += 1
        except MoecError as error:
            found[f"message: {error.where}: {error.found}"] += 1
        except BaseException as error:
            found[f"error: {error!r}"] += 1
    answers.put((name, dict(found)))


if __name__ == "__main__":
    main()
