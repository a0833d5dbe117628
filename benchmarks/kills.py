"""Kill builds at random moments; count half-valid artefacts, and re-runs that are not the same.

    python benchmarks/kills.py [--kills 100] [--seed 0] [--checkpoint DIR]

Each build runs in a process that a warm parent forks, and gets SIGKILL at a random moment. Before
that, the place of the artefact is free, or holds an older one. Afterwards it must hold nothing, the
older one, or the new one, byte for byte. The same build then runs again, undisturbed. Its artefact
must be the same bytes as one that was never disturbed, and nothing else may be left. The journal of
packed weights gets an entry for every 256 kB instead of every 256 MB, so that builds of a small
checkpoint go on where they were killed. The exit code is 1 if one of these is not so.
"""

import argparse
import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

import moec
from moec.weights.packed import file as packed_file
from moec.weights.packed.journal import unfinished

TINY = Path(__file__).parents[1] / "examples" / "tiny-scout"
Build = Callable[[Path, Path], object]


def _bind(checkpoint: Path, out: Path) -> None:
    moec.bind(out.parent / "unbound", checkpoint, out, weights="copy")


#: the name of a build -> (checkpoint, out)
BUILDS: dict[str, Build] = {
    "copy": lambda checkpoint, out: moec.export(checkpoint, out=out, weights="copy"),
    "pack fp8": lambda checkpoint, out: moec.export(checkpoint, precision="fp8", out=out),
    "ort int4": lambda checkpoint, out: moec.export(checkpoint, "ort", "int4", out),
    "bind": _bind,
}
Tree = dict[str, str]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--kills", type=int, default=100)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--checkpoint", type=Path, default=TINY)
    given = arguments.parse_args()
    packed_file.JOURNAL_BYTES = 1 << 18
    draw = random.Random(given.seed)
    counts: dict[str, Counter[str]] = {name: Counter() for name in BUILDS}
    with tempfile.TemporaryDirectory(prefix="moec-kills-") as scratch:
        folder = Path(scratch)
        work, old, unbound = folder / "work", folder / "old", folder / "unbound"
        work.mkdir()
        moec.export(moec.load_spec(given.checkpoint), out=unbound)
        moec.export(given.checkpoint, precision="fp16", out=old, weights="copy")
        shutil.copytree(unbound, work / "unbound")
        whole, seconds = {}, {}
        for name, build in BUILDS.items():
            build(given.checkpoint, work / "art")  # imports all that it needs
            whole[name] = _tree(work / "art")
            start = time.perf_counter()
            _child(lambda build=build: build(given.checkpoint, work / "art"))
            seconds[name] = time.perf_counter() - start
            shutil.rmtree(work / "art")
        for number in range(given.kills):
            name = list(BUILDS)[number % len(BUILDS)]
            if number // len(BUILDS) % 2:
                shutil.copytree(old, work / "art")
            build = BUILDS[name]
            found = _kill(build, given.checkpoint, work, draw.uniform(0, 1.1 * seconds[name]))
            known: dict[str, Tree] = {"new": whole[name], "older": _tree(old), "none": {}}
            now = _tree(work / "art") if (work / "art").exists() else {}
            state = next((each for each, tree in known.items() if tree == now), "half-valid")
            counts[name].update((found, state))
            counts[name]["resumable"] += any(bool(unfinished(each)) for each in work.glob(".art.*"))
            _child(lambda build=build: build(given.checkpoint, work / "art"))
            same = _tree(work / "art") == whole[name]
            left = {each.name for each in work.iterdir()} != {"art", "unbound"}
            counts[name].update({"same": same, "left over": left})
            shutil.rmtree(work)
            work.mkdir()
            shutil.copytree(unbound, work / "unbound")
    _report(counts)


def _child(call: Callable[[], object]) -> None:
    """Run `call` in a forked process, to its end."""
    process = _fork(call)
    _, status = os.waitpid(process, 0)
    if status:
        raise SystemExit("an undisturbed build failed")


def _fork(call: Callable[[], object]) -> int:
    process = os.fork()
    if not process:
        status = 1
        try:
            call()
            status = 0
        finally:
            os._exit(status)
    return process


def _kill(build: Build, checkpoint: Path, work: Path, after: float) -> str:
    """Start a build and kill it `after` seconds: whether it was "killed" or "over" by then."""
    process = _fork(lambda: build(checkpoint, work / "art"))
    time.sleep(after)
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    return "killed" if os.WIFSIGNALED(status) else "over"


def _tree(folder: Path) -> Tree:
    """Every file below `folder`, with the hash of its bytes."""
    return {
        each.relative_to(folder).as_posix(): hashlib.sha256(each.read_bytes()).hexdigest()
        for each in sorted(folder.rglob("*"))
        if each.is_file()
    }


def _report(counts: dict[str, Counter[str]]) -> None:
    table = Table(box=SIMPLE)
    columns = (
        "killed", "over", "none", "older", "new", "half-valid", "resumable", "same", "left over",
    )  # fmt: skip
    for column in ("build", *columns):
        table.add_column(column, justify="left" if column == "build" else "right")
    for name, count in counts.items():
        table.add_row(name, *(str(count[column]) for column in columns))
    total = sum(counts.values(), Counter())
    kills = total["killed"] + total["over"]
    table.add_row("all", *(str(total[column]) for column in columns), style="bold")
    console = Console(width=110)
    console.print(table)
    console.print(
        f"{kills} kills, {total['over']} of them after the build's end: {total['half-valid']} "
        f"half-valid artefacts, {total['same']} of {kills} re-runs byte-identical"
    )
    sys.exit(bool(total["half-valid"] or total["left over"] or total["same"] != kills))


if __name__ == "__main__":
    main()
