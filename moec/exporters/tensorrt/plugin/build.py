"""Write the sources of the MoE plugin for a model to a folder, and compile them if possible.

The folder has all that is needed to compile the plugin elsewhere. Its build.sh needs a C++
compiler, and the headers of TensorRT and CUDA.
"""

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from moec.kernels.ahead_of_time.plugin_program import build_program, identity
from moec.kernels.sizes import Sizes
from moec.spec.errors import refuse

LIBRARY, PROGRAMS, SCRIPT = "libmoec_plugin.so", "programs.bin", "build.sh"
SOURCES = (
    "program.h",
    "program.cpp",
    "driver.h",
    "driver.cpp",
    "launcher.h",
    "launcher.cpp",
    "surface.cpp",
    "moe_plugin.cpp",
    "programs.S",
)
#: the headers, and the environment variables that name their folders
HEADERS = {"NvInferRuntime.h": "TENSORRT_INCLUDE", "cuda.h": "CUDA_INCLUDE"}
#: the folders where headers usually are
USUAL = (
    "/usr/include",
    "/usr/include/x86_64-linux-gnu",
    "/usr/include/aarch64-linux-gnu",
    "/usr/local/cuda/include",
    "/usr/local/tensorrt/include",
)
COMMAND = """#!/bin/sh
# Compiles {library}. TENSORRT_INCLUDE names the folder with NvInferRuntime.h of TensorRT 11 or
# TensorRT-RTX, whichever will load the library. CUDA_INCLUDE names the folder with cuda.h of CUDA
# 12 or newer.
cd "$(dirname "$0")" || exit 1
exec "${{CXX:-g++}}" -std=c++17 -O2 -shared -fPIC -fvisibility=hidden \\
    -I"${{TENSORRT_INCLUDE:?}}" -I"${{CUDA_INCLUDE:?}}" \\
    {sources} -ldl -o {library}
"""


@dataclass(frozen=True, slots=True)
class Plugin:
    """A plugin that was written to `folder`, and compiled if possible.

    If `library` is None, `why` says why it was not compiled. `command` compiles it. `programs` has
    the SHA-256 of each size's program, which a TensorRT engine records.
    """

    folder: Path
    library: Path | None
    why: str
    command: str
    programs: dict[Sizes, str]


def compile_plugin(
    sizes: Sequence[Sizes],
    max_tokens: int,
    architectures: Sequence[int],
    out: Path,
    include: Path | None = None,
) -> Plugin:
    """Write the plugin for MoE layers of these `sizes` to the folder `out`, and compile it.

    A layer runs at most `max_tokens` tokens at once and splits larger calls. `include` is the
    folder of TensorRT's headers; by default it is TENSORRT_INCLUDE or a usual folder.

    Raises:
        MoecError: there are no kernels for these sizes or architectures.
        OSError: the files cannot be written.
    """
    made = {each: build_program(each, max_tokens, architectures) for each in dict.fromkeys(sizes)}
    _refuse_links(out)
    out.mkdir(parents=True, exist_ok=True)
    for name in SOURCES:
        (out / name).write_bytes((files(__package__) / name).read_bytes())
    (out / PROGRAMS).write_bytes(b"".join(made.values()))
    script = out / SCRIPT
    compiled = " ".join(name for name in SOURCES if not name.endswith(".h"))
    script.write_text(COMMAND.format(library=LIBRARY, sources=compiled))
    script.chmod(0o755)
    library, why, command = _compile(out, include)
    return Plugin(out, library, why, command, {each: identity(made[each]) for each in made})


def _refuse_links(out: Path) -> None:
    """Refuse to write through a link that an artefact's author put in the place of a file.

    Raises:
        MoecError: `out`, the folder above it, or a file of `out` is a link.
    """
    links = [out.parent, out, *(out.iterdir() if out.is_dir() else ())]
    for each in links:
        if each.is_symlink():
            refuse(each, "a link", "a folder and files of its own", f"remove {each}")


def _compile(out: Path, include: Path | None) -> tuple[Path | None, str, str]:
    """Compile the library; return its path or None, why it is None, and the command."""
    (out / LIBRARY).unlink(missing_ok=True)
    asked = {name: os.environ.get(name) for name in HEADERS.values()}
    if include:
        asked["TENSORRT_INCLUDE"] = str(include)
    found = {name: _folder(header, asked[name]) for header, name in HEADERS.items()}
    if not asked["CUDA_INCLUDE"] and not found["CUDA_INCLUDE"]:
        found["CUDA_INCLUDE"] = _triton_include()
    given = {name: str(found[name] or f"FOLDER-OF-{header}") for header, name in HEADERS.items()}
    assigned = [f"{name}={shlex.quote(each)}" for name, each in given.items()]
    command = " ".join((*assigned, shlex.quote(str((out / SCRIPT).resolve()))))
    missing = [
        f"{header} in {asked[name] or ', '.join(USUAL)}"
        for header, name in HEADERS.items()
        if not found[name]
    ]
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        missing.append(f"C++ compiler {compiler}")
    if missing:
        return None, f"no {', and no '.join(missing)}", command
    done = subprocess.run(
        ["sh", out / SCRIPT], env=os.environ | given, capture_output=True, text=True
    )
    if done.returncode:
        return None, f"{compiler} failed: {done.stderr.strip()[-2000:]}", command
    return out / LIBRARY, "", command


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
