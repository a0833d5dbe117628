"""Write the sources of a library around the launcher to a folder, and compile them if possible.

A library is the launcher, the programs that it launches, and a face: the C++ code with which a
runtime such as TensorRT or ONNX Runtime calls it. The folder has all that is needed to compile the
library elsewhere.
"""

import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from moec.spec.errors import refuse

PROGRAMS, SCRIPT = "programs.bin", "build.sh"
#: how the bytes of a program start
MAGIC = b"moecprog"
SOURCES = (
    "program.h",
    "program.cpp",
    "driver.h",
    "driver.cpp",
    "launcher.h",
    "launcher.cpp",
    "surface.cpp",
    "programs.S",
)
#: CUDA's header, and the environment variable that names its folder; both faces need it
CUDA = {"cuda.h": "CUDA_INCLUDE"}
#: the folders where headers usually are
USUAL = (
    "/usr/include",
    "/usr/include/x86_64-linux-gnu",
    "/usr/include/aarch64-linux-gnu",
    "/usr/local/cuda/include",
    "/usr/local/tensorrt/include",
)
COMMAND = """#!/bin/sh
# Compiles {library}.{notes}
# CUDA_INCLUDE names the folder with cuda.h of CUDA 12 or newer.
cd "$(dirname "$0")" || exit 1
exec "${{CXX:-g++}}" -std=c++17 -O2 -shared -fPIC -fvisibility=hidden \\
    {includes} \\
    {sources} -ldl -o {library}
"""


@dataclass(frozen=True, slots=True)
class Face:
    """The part of a library that a runtime calls.

    Attributes:
        library: the name of the library's file.
        package: the package that has the sources.
        sources: their names.
        headers: the headers that it needs besides CUDA's, and the environment variables that name
            their folders.
        notes: lines for build.sh that say more about the headers.
    """

    library: str
    package: str
    sources: tuple[str, ...]
    headers: Mapping[str, str]
    notes: str = ""


@dataclass(frozen=True, slots=True)
class Library:
    """A library that was written to `folder`, and compiled if possible.

    If `library` is None, `why` says why it was not compiled. `command` compiles it.
    """

    folder: Path
    library: Path | None
    why: str
    command: str


def write_library(
    face: Face, programs: bytes, out: Path, given: Mapping[str, Path] | None = None
) -> Library:
    """Write the library of `face` with these `programs` to the folder `out`, and compile it.

    `given` names folders of headers, by their environment variables; by default these variables
    are read, and then the usual folders are searched.

    Raises:
        MoecError: `out` or a file in it is a link.
        OSError: the files cannot be written.
    """
    _refuse_links(out)
    out.mkdir(parents=True, exist_ok=True)
    for name, content in sources_of(face).items():
        (out / name).write_bytes(content)
    (out / PROGRAMS).write_bytes(programs)
    script, compiled = out / SCRIPT, [*SOURCES, *face.sources]
    headers = {**face.headers, **CUDA}
    script.write_text(
        COMMAND.format(
            library=face.library,
            notes=face.notes,
            includes=" ".join(f'-I"${{{name}:?}}"' for name in headers.values()),
            sources=" ".join(name for name in compiled if not name.endswith(".h")),
        )
    )
    script.chmod(0o755)
    library, why, command = _compile(face.library, headers, out, given or {})
    return Library(out, library, why, command)


def is_program(file: Path) -> bool:
    """Whether a file starts as programs do."""
    try:
        with file.open("rb") as opened:
            return opened.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def sources_of(face: Face) -> dict[str, bytes]:
    """The sources of a library by name: those of the launcher and of its face."""
    every = ((__package__, SOURCES), (face.package, face.sources))
    return {
        name: (files(package) / name).read_bytes() for package, names in every for name in names
    }


def _refuse_links(out: Path) -> None:
    """Refuse to write through a link that an artefact's author put in the place of a file.

    Raises:
        MoecError: `out`, the folder above it, or a file of `out` is a link.
    """
    links = [out.parent, out, *(out.iterdir() if out.is_dir() else ())]
    for each in links:
        if each.is_symlink():
            refuse(each, "a link", "a folder and files of its own", f"remove {each}")


def _compile(
    library: str, headers: Mapping[str, str], out: Path, given: Mapping[str, Path]
) -> tuple[Path | None, str, str]:
    """Compile the library; return its path or None, why it is None, and the command."""
    (out / library).unlink(missing_ok=True)
    asked = {name: os.environ.get(name) for name in headers.values()}
    asked |= {name: str(folder) for name, folder in given.items()}
    found = {name: _folder(header, asked[name]) for header, name in headers.items()}
    if not asked["CUDA_INCLUDE"] and not found["CUDA_INCLUDE"]:
        found["CUDA_INCLUDE"] = _triton_include()
    named = {name: str(found[name] or f"FOLDER-OF-{header}") for header, name in headers.items()}
    assigned = [f"{name}={shlex.quote(each)}" for name, each in named.items()]
    command = " ".join((*assigned, shlex.quote(str((out / SCRIPT).resolve()))))
    missing = [
        f"{header} in {asked[name] or ', '.join(USUAL)}"
        for header, name in headers.items()
        if not found[name]
    ]
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        missing.append(f"C++ compiler {compiler}")
    if missing:
        return None, f"no {', and no '.join(missing)}", command
    done = subprocess.run(
        ["sh", out / SCRIPT], env=os.environ | named, capture_output=True, text=True
    )
    if done.returncode:
        return None, f"{compiler} failed: {done.stderr.strip()[-2000:]}", command
    return out / library, "", command


def _folder(header: str, asked: str | None) -> Path | None:
    """The folder with `header`: `asked` if given, or else one of the usual folders."""
    folders = [asked] if asked else USUAL
    found = next((Path(each) for each in folders if Path(each, header).is_file()), None)
    return found and found.resolve()


def _triton_include() -> Path | None:
    """The folder of CUDA's headers inside the package triton, which has a copy of them."""
    spec = find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    found = Path(spec.origin).parent / "backends/nvidia/include"
    return found if (found / "cuda.h").is_file() else None
