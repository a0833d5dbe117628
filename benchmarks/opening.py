"""Time what opening an artefact checks, beside opening without the hashes.

    python benchmarks/opening.py [--repeats 9]

`open_session` compares sizes and headers, the hashes of the graphs and of the other small files,
and the digest of the manifest. The script opens tiny-scout with and without the two checks that
hash, in turn, and prints the least of both, because other programs only add to it. It does not open
full-size Scout, which has no weights here: it reads and checks the manifest and the graphs. The
exit code is 1 if the hashes take 50 ms.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

import moec
from moec.artefact.artefact import check_digest, check_files, open_artefact
from moec.artefact.manifest import NAME, digest_of
from moec.runtime import open as opening
from moec.spec.fields import read_json

TINY = Path(__file__).parents[1] / "examples" / "tiny-scout"
LIMIT = 0.050


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--repeats", type=int, default=9)
    repeats = arguments.parse_args().repeats
    table = Table(box=SIMPLE)
    for column in ("", "small files", "without hashes", "with", "the hashes take"):
        table.add_column(column, justify="right" if column else "left")
    late = []
    with tempfile.TemporaryDirectory() as scratch:
        rows: dict[str, tuple[Path, Callable[[Path], object]]] = {
            "tiny-scout, in place": (moec.export(TINY, out=f"{scratch}/a").path, moec.open_session),
            "tiny-scout, int4": (
                moec.export(TINY, "ort", "int4", f"{scratch}/b").path,
                moec.open_session,
            ),
            "Scout, unbound": (moec.export("scout", out=f"{scratch}/c").path, _read),
            "Scout for ort, unbound": (moec.export("scout", "ort", out=f"{scratch}/d").path, _read),
        }
        for name, (path, call) in rows.items():
            size = sum(each.size for each in open_artefact(path).manifest.files.values())
            before, after = _least(call, path, repeats)
            hashes = min(_hash(path) for _ in range(repeats))
            late += [name] if hashes >= LIMIT else []
            cells = (f"{1e3 * each:.1f} ms" for each in (before, after, hashes))
            table.add_row(name, f"{size / 1e6:.1f} MB", *cells)
    Console(width=110).print(table)
    print(f"the limit of the last column is {1e3 * LIMIT:.0f} ms: {', '.join(late) or 'all kept'}")
    sys.exit(bool(late))


def _read(path: Path) -> None:
    """What `open_session` does before an engine opens the graph."""
    artefact = open_artefact(path)
    opening.check_files(artefact, opening.files_of_sessions(artefact))
    opening.check_digest(artefact)


def _hash(path: Path) -> float:
    """The seconds of the hashes alone, without those to read the manifest."""
    artefact, values = open_artefact(path), read_json(path / NAME)
    start = time.perf_counter()
    digest_of(values)
    check_files(artefact, opening.files_of_sessions(artefact))
    check_digest(artefact)
    return time.perf_counter() - start


def _least(call: Callable[[Path], object], path: Path, repeats: int) -> tuple[float, float]:
    """The seconds of `call` without and with the checks that hash, in turn."""
    call(path)
    checks = opening.check_files, opening.check_digest
    before, after = [], []
    for _ in range(repeats):
        opening.check_files = opening.check_digest = lambda *_: None  # type: ignore[assignment]
        before.append(_timed(call, path))
        opening.check_files, opening.check_digest = checks
        after.append(_timed(call, path))
    return min(before), min(after)


def _timed(call: Callable[[Path], object], path: Path) -> float:
    start = time.perf_counter()
    call(path)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
