"""Build ONNX Runtime's custom-op library for the fused ops of a model.

The library is native code. Sessions load the one in this user's own cache folder, which is compiled
here from moec's sources when it is needed first, and none that an artefact brings along.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path

import triton

from moec.kernels.ahead_of_time.program import build_program
from moec.kernels.ahead_of_time.variants import Operation
from moec.kernels.launcher.build import Face, Library, build_library, sources_of
from moec.spec.errors import refuse

LIBRARY = "libmoec_ort.so"
FACE = Face(
    library=LIBRARY,
    package=__package__,
    sources=("library.cpp", "ort_api.h"),
    headers={},
)


def compile_library(
    operations: Iterable[Operation], architectures: Sequence[int], out: Path
) -> Library:
    """Write the library with programs of `operations` to the folder `out`, and compile it.

    Raises:
        MoecError: there are no kernels for these sizes or architectures.
        OSError: the files cannot be written.
    """
    programs = b"".join(build_program(each, architectures) for each in operations)
    return build_library(FACE, programs, out)


def own_library(operations: Sequence[Operation], architectures: Sequence[int]) -> Path:
    """The compiled library with programs of `operations`, in this user's cache folder.

    Raises:
        MoecError: there are no kernels for these sizes or architectures; or, with exit code 3, the
            library cannot be compiled here.
    """
    folder = cache_folder() / key_of(operations, architectures)
    if (folder / LIBRARY).is_file():
        return folder / LIBRARY
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
        try:
            (draft / "library").rename(folder)
        except OSError:  # another process was faster
            if not (folder / LIBRARY).is_file():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder / LIBRARY


def key_of(operations: Sequence[Operation], architectures: Sequence[int]) -> str:
    """What stands for a library: a hash of all that goes into it.

    These are the operations, Triton's version, and the sources of the kernels and of the library.
    """
    whole = hashlib.sha256(f"{triton.__version__} {sorted(set(architectures))}".encode())
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
        base = os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "moec" / "libraries"
