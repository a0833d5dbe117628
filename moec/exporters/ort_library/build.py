"""Build ONNX Runtime's custom-op library for the fused ops of a model.

The library is native code. Sessions load the one in this user's own cache folder, which is compiled
here from moec's sources when it is needed first, and none that an artefact brings along.
"""

import hashlib
import logging
import os
import platform
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from moec.artefact.artefact import open_artefact
from moec.artefact.folder import writing
from moec.kernels.launcher.build import (
    PROGRAMS,
    SCRIPT,
    Face,
    Library,
    is_program,
    sources_of,
    write_library,
)
from moec.kernels.sizes import check_sizes
from moec.spec.errors import refuse
from moec.weights.joined import ORT_CUDA

if TYPE_CHECKING:
    from moec.kernels.ahead_of_time.variants import Operation

_LOG = logging.getLogger(__name__)
LIBRARY = "libmoec_ort.so"
#: the file beside a cached library with the SHA-256 of it
HASH = "sha256"
FACE = Face(
    library=LIBRARY,
    package=__package__,
    sources=("library.cpp", "ort_api.h"),
    headers={},
)


def build_library(
    artefact: str | Path, out: str | Path | None = None, architectures: Sequence[str] = ()
) -> Library:
    """Write the library of an artefact of target `ort-cuda`, and compile it if possible.

    It is for programs that run the artefact without moec. The folder has all that is needed to
    compile the library elsewhere: its build.sh needs a C++ compiler and cuda.h.

    Args:
        artefact: the artefact's folder.
        out: the folder to write; default ARTEFACT-library.
        architectures: the GPU architectures to build for, such as "SM90", which is the default.

    Raises:
        MoecError: the artefact is of another target, or `out` holds something else (exit code 2);
            Triton is not installed, or a compiler fails where a library is already (3); or there
            are no kernels for the model's sizes or an architecture.
    """
    art = open_artefact(artefact)
    if art.manifest.dialect != ORT_CUDA:
        refuse(
            artefact,
            f"an artefact of target {art.manifest.target}",
            "one for ONNX Runtime on a GPU in FP8",
            "moec build --target ort --precision fp8 --device cuda",
        )
    if find_spec("triton") is None:
        refuse(
            "ONNX Runtime's custom-op library",
            "no package triton",
            "triton, which compiles its kernels",
            "pip install triton",
            exit_code=3,
        )
    from moec.exporters.ort_library.operations import operations_for

    check_sizes(art.manifest.spec)
    names = [each.upper() for each in architectures] or ["SM90"]
    odd = next((each for each in names if not re.fullmatch("SM[0-9]{2,3}", each)), None)
    if odd:
        refuse(f"--sm {odd}", "no such architecture", "one such as SM90", "correct --sm")
    wanted = [int(each.removeprefix("SM")) for each in names]
    path = art.path.absolute().resolve()
    folder = Path(out).absolute() if out else path.with_name(f"{path.name}-library")
    folder = folder.parent.resolve() / folder.name
    if path in folder.parents:
        refuse(f"--out {folder}", "a folder of the artefact", "another", "choose another --out")
    return _in_place(operations_for(art.manifest), wanted, folder)


def _refuse_others(folder: Path) -> None:
    """Refuse a folder that is no library of ours, whose files would be lost."""
    known = {*sources_of(FACE), PROGRAMS, SCRIPT, LIBRARY}
    ours = not os.path.lexists(folder)
    if not ours and folder.is_dir() and not folder.is_symlink():
        there = {each.name: each.lstat() for each in folder.iterdir()}
        regular = all(stat.S_ISREG(each.st_mode) for each in there.values())
        ours = not there or (regular and there.keys() <= known and is_program(folder / PROGRAMS))
    if not ours:
        found = "something else than a library"
        refuse(f"--out {folder}", found, "a new folder", "choose another --out")


def _in_place(operations: "Iterable[Operation]", architectures: list[int], folder: Path) -> Library:
    """Write a library to `folder` in one step; one that is there stays if compiling fails."""
    with writing(folder, _refuse_others) as draft:
        made = compile_library(operations, architectures, draft)
        if made.library is None and (folder / LIBRARY).is_file():
            expected = "a C++ compiler that compiles it"
            refuse(folder, made.why, expected, "the library that is there stays", exit_code=3)
    command = made.command.replace(str(draft.resolve()), str(folder.resolve()))
    return Library(folder, made.library and folder / LIBRARY, made.why, command)


def compile_library(
    operations: "Iterable[Operation]", architectures: Sequence[int], out: Path
) -> Library:
    """Write the library with programs of `operations` to the folder `out`, and compile it.

    Raises:
        MoecError: there are no kernels for these sizes or architectures.
        OSError: the files cannot be written.
    """
    from moec.kernels.ahead_of_time.program import build_programs  # imports Triton

    programs = b"".join(build_programs(operations, architectures))
    return write_library(FACE, programs, out)


def own_library(operations: "Sequence[Operation]", architectures: Sequence[int]) -> Path:
    """The compiled library with programs of `operations`, in this user's cache folder.

    Raises:
        MoecError: there are no kernels for these sizes or architectures; or, with exit code 3, the
            library cannot be compiled here.
    """
    folder = cache_folder() / key_of(operations, architectures)
    if _is_whole(folder):
        return folder / LIBRARY
    _LOG.info("compiling this model's kernels, once for this kind of GPU; it takes about a minute")
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
    try:
        made = compile_library(operations, architectures, draft / "library")
        if made.library is None:
            refuse(
                "ONNX Runtime's custom-op library",
                made.why,
                "a C++ compiler and cuda.h, which the package triton has",
                "install what is missing; CXX names the compiler, CUDA_INCLUDE cuda.h's folder",
                exit_code=3,
            )
        _seal(made.library)
        try:
            (draft / "library").rename(folder)
        except OSError:  # another process was faster, or what is there is damaged
            if not _is_whole(folder):
                folder.rename(draft / "damaged")
                (draft / "library").rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder / LIBRARY


def _seal(library: Path) -> None:
    """Write the library's hash beside it, when all of its bytes are on the disk.

    Nobody but this user may write to either, whatever the user's umask is.
    """
    with library.open("rb") as file:
        os.fsync(file.fileno())
    library.with_name(HASH).write_text(_sha256(library))
    for each in (library.parent, library, library.with_name(HASH)):
        each.chmod(each.stat().st_mode & ~0o022)


def _is_whole(folder: Path) -> bool:
    """Whether a folder of the cache has a library as this user has compiled it."""
    try:
        for each in (folder, folder / LIBRARY, folder / HASH):
            found = each.lstat()
            if stat.S_ISLNK(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
                return False
        return (folder / HASH).read_text() == _sha256(folder / LIBRARY)
    except (OSError, UnicodeDecodeError):
        return False


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def key_of(operations: "Sequence[Operation]", architectures: Sequence[int]) -> str:
    """What stands for a library: a hash of all that goes into it.

    These are the operations, the machine, Triton's version, and the sources of the kernels and of
    the library.
    """
    machine = platform.machine(), platform.libc_ver(), version("triton")
    whole = hashlib.sha256(f"{machine} {sorted(set(architectures))}".encode())
    for each in operations:
        given = each.name, dict(each.constants), each.inputs, each.outputs, each.most
        whole.update(repr(given).encode())
    kernels = Path(str(files("moec.kernels")))
    for path in sorted(kernels.rglob("*.py")):
        whole.update(path.relative_to(kernels).as_posix().encode() + path.read_bytes())
    for name, content in sources_of(FACE).items():
        whole.update(name.encode() + content)
    return whole.hexdigest()


def cache_folder() -> Path:
    """Where this user's libraries are: $XDG_CACHE_HOME/moec, by default ~/.cache/moec."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the specification of XDG says to ignore a relative path
        base = os.path.join(os.path.abspath(os.path.expanduser("~")), ".cache")
    return Path(base) / "moec" / "libraries"
