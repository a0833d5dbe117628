"""Write a folder so that other processes see all of it or nothing."""

import itertools
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath

from moec.artefact.opening.foreign import foreign_file, is_artefact
from moec.spec.errors import refuse
from moec.weights.packed.journal import unfinished
from moec.weights.trust import leftovers


@contextmanager
def writing(out: Path, check: Callable[[Path], None] | None = None) -> Iterator[Path]:
    """Yield a temporary folder beside `out`, and rename it to `out` when the block succeeds.

    The rename replaces an artefact that `out` holds. If the block raises, the temporary folder is
    removed. If the process is killed, the folder stays under a hidden name, and the next build of
    the same `out` removes it.

    Ctrl-C and a kill leave half-written packed weights behind on purpose: the next build of the
    same `out` finds them in its temporary folder and continues them. It does so only with a folder
    that this user's own build has recorded (`moec.weights.trust.leftovers`).

    Args:
        out: the folder to write.
        check: refuses what must not be replaced; default `refuse_foreign`.

    Raises:
        MoecError: `check` refuses what `out` holds, another thread of this process writes `out`,
            `out` cannot be written, or the disk is full.
    """
    out = Path(os.path.abspath(out))  # "." has no name for the temporary folder
    with _claimed(out), _replacing(out, check or refuse_foreign) as partial:
        yield partial


#: which call writes a folder; with the id of its process, because a forked child inherits this
_claims: dict[tuple[int, Path], object] = {}


@contextmanager
def _claimed(out: Path) -> Iterator[None]:
    """Let no other thread of this process write `out` meanwhile.

    The name of a temporary folder has the id of its process alone, so a second thread would take
    the folder of the first one for a leftover.
    """
    claim = os.getpid(), Path(os.path.realpath(out.parent)) / out.name
    own = object()
    if _claims.setdefault(claim, own) is not own:  # one step, whatever other threads do
        refuse(
            f"--out {out}",
            "another thread of this process writes this folder",
            "one build of a folder at a time in a process",
            "wait until that build has ended, or choose another --out",
        )
    try:
        yield
    finally:
        del _claims[claim]


@contextmanager
def _replacing(out: Path, check: Callable[[Path], None]) -> Iterator[Path]:
    """What `writing` does, for an absolute path that no other thread writes."""
    partial, replaced = (out.parent / f".{out.name}.{kind}-{os.getpid()}" for kind in _KINDS)
    made: list[Path] = []
    kept: tuple[Path, ...] = ()
    records: list[str] = []
    try:
        check(out)
        made = [parent for parent in out.parents if not parent.exists()]
        out.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(partial):  # this process left it in an earlier build
            _set_aside(partial, _unused_name(out))
        partial.mkdir()
        records.append(leftovers.record(partial))
        _remove_stale(out, partial)
        try:
            yield partial
        except Exception:
            raise
        except BaseException:
            kept = unfinished(partial)
            raise
        check(out)
        if out.exists():
            records.append(leftovers.record(out, replaced))
            out.rename(replaced)
        partial.rename(out)
        made = []
    except OSError as error:
        refuse(
            error.filename or out,
            error.strerror or error,
            "a folder that can be written, with room on the disk",
            "choose another --out, or make room",
        )
    finally:
        with suppress(OSError):  # the name of `out` may be too long
            for path in partial.iterdir() if kept else ():
                if path not in kept:
                    _remove(path)
            if not kept:
                shutil.rmtree(partial, ignore_errors=True)
            if replaced.exists() and not out.exists():
                replaced.rename(out)
            for record in () if kept else records:
                leftovers.forget(record)
            shutil.rmtree(replaced, ignore_errors=True)
            for parent in made:
                parent.rmdir()


def _unused_name(out: Path) -> Path:
    """An unused name for a leftover folder. Its number begins with 0, as no process id does."""
    names = (out.parent / f".{out.name}.moec-partial-0{i}" for i in itertools.count())
    return next(name for name in names if not os.path.lexists(name))


def _set_aside(partial: Path, name: Path) -> None:
    own = leftovers.take_over(partial)
    partial.rename(name)
    if own:
        leftovers.record(name)


def _remove(path: Path) -> None:
    if _is_folder(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink()


def _is_folder(path: Path) -> bool:
    """Whether `path` itself is a folder, and no link to one."""
    return stat.S_ISDIR(os.lstat(path).st_mode)


def default_out(name: str, target: str, precision: str) -> Path:
    """The folder of a build whose user names none: one folder below `build`.

    Raises:
        MoecError: the spec's name is no name of a folder.
    """
    return default_folder(f"{name}-{target}-{precision}")


def default_folder(folder: str) -> Path:
    """The folder below `build` of what a user names no folder for.

    Raises:
        MoecError: `folder`, which starts with the spec's name, is no name of a folder.
    """
    parts = len(PurePath(folder).parts)
    plain = folder.isprintable() and not set(folder) & set('/\\:*?"<>|') and len(folder) < 200
    if parts != 1 or not plain or folder.startswith((".", "-", " ")):
        refuse(
            f"spec.name {folder!r}"[:200],
            "no name of a folder",
            "a name of letters, digits and hyphens, or a folder that you name",
            "add --out DIR",
        )
    return Path("build") / folder


_KINDS = ("moec-partial", "moec-replaced")


def refuse_foreign(out: Path) -> None:
    """Refuse an `out` that holds anything other than an artefact with its own files.

    Raises:
        MoecError: `out` is a file, a link, or a folder with a file that no build of moec wrote.
    """
    expected = (
        "a new or empty folder, or an artefact to replace, with the files of its manifest alone"
    )
    next_step = "choose another, or move that file elsewhere"
    _refuse_other(out, expected, next_step)
    if os.path.isdir(out) and (foreign := foreign_file(out)) is not None:
        found = f"a folder that holds something else ({foreign}, ...)"
        refuse(f"--out {out}", found, expected, next_step)


def refuse_filled(out: Path) -> None:
    """Refuse an `out` that is there already, unless it is an empty folder.

    Raises:
        MoecError: `out` is a file, a link, or a folder that holds something.
    """
    expected, next_step = "a new or empty folder", "choose another, or remove it first"
    _refuse_other(out, expected, next_step)
    if os.path.isdir(out) and (names := sorted(os.listdir(out))):
        found = f"a folder that holds something ({names[0]}, ...)"
        refuse(f"--out {out}", found, expected, next_step)


def _refuse_other(out: Path, expected: str, next_step: str) -> None:
    """Refuse an `out` that is there and no folder."""
    # os.path returns False for a name that is too long, where pathlib raises.
    link = os.path.islink(out)
    if link or (os.path.exists(out) and not os.path.isdir(out)):
        refuse(f"--out {out}", "a link" if link else "a file", expected, next_step)


def _remove_stale(out: Path, partial: Path) -> None:
    """Remove the folders that dead processes left for `out`.

    What this user's build has left is put to use: half-written packed weights are moved into
    `partial`, and an artefact that was killed out of its place goes back there. If the place is
    free and somebody else has left the artefact, it is left alone. So are links with such a name,
    since no build leaves one.
    """
    for kind in _KINDS:
        prefix = f".{out.name}.{kind}-"
        for path in list(out.parent.iterdir()):
            pid = path.name.removeprefix(prefix)
            if not path.name.startswith(prefix) or not pid.isdigit() or path == partial:
                continue
            if not _is_folder(path):
                continue
            if pid == str(os.getpid()) or not Path(f"/proc/{pid}").exists():
                own = leftovers.take_over(path)
                if kind == "moec-replaced" and not out.exists() and is_artefact(path):
                    if own:
                        path.rename(out)  # killed between two renames: put the old one back
                else:
                    for file in unfinished(path) if own else ():
                        file.rename(partial / file.name)
                    shutil.rmtree(path, ignore_errors=True)
