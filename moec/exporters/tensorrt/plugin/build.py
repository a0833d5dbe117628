"""The plugin library of a model: sources and programs in a folder, compiled where that is possible.

The folder is enough to compile it elsewhere: its build.sh wants a C++ compiler, TensorRT's headers
and CUDA's.
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
from moec.kernels.launches.launch import Sizes

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
#: a header -> the variable that says which folder it is in
HEADERS = {"NvInferRuntime.h": "TENSORRT_INCLUDE", "cuda.h": "CUDA_INCLUDE"}
#: where headers are installed
USUAL = (
    "/usr/include",
    "/usr/include/x86_64-linux-gnu",
    "/usr/include/aarch64-linux-gnu",
    "/usr/local/cuda/include",
    "/usr/local/tensorrt/include",
)
COMMAND = """#!/bin/sh
# Compiles {library}. TENSORRT_INCLUDE is the folder that has NvInferRuntime.h of the TensorRT 11 or
# TensorRT-RTX that is to load it, CUDA_INCLUDE the one that has cuda.h of CUDA 12 or newer.
cd "$(dirname "$0")" || exit 1
exec "${{CXX:-g++}}" -std=c++17 -O2 -shared -fPIC -fvisibility=hidden \\
    -I"${{TENSORRT_INCLUDE:?}}" -I"${{CUDA_INCLUDE:?}}" \\
    {sources} -ldl -o {library}
"""


@dataclass(frozen=True, slots=True)
class Plugin:
    """What came of it. Without a `library`, `why` it was not compiled; `command` is what does it.

    `programs` has the SHA-256 of each size's program, which an engine keeps.
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
    """The plugin of a model whose MoE layers have these sizes, in the folder `out`.

    Layers run more than `max_tokens` tokens in parts. `include` is the folder of TensorRT's
    headers; without one it is TENSORRT_INCLUDE, or where such headers usually are.

    Raises:
        MoecError: no kernels for these sizes or architectures; no room on the disk is an OSError.
    """
    made = {each: build_program(each, max_tokens, architectures) for each in dict.fromkeys(sizes)}
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


def _compile(out: Path, include: Path | None) -> tuple[Path | None, str, str]:
    """(library, why there is none, command)."""
    (out / LIBRARY).unlink(missing_ok=True)
    asked = {name: os.environ.get(name) for name in HEADERS.values()}
    if include:
        asked["TENSORRT_INCLUDE"] = str(include)
    found = {name: _folder(header, asked[name]) for header, name in HEADERS.items()}
    if not asked["CUDA_INCLUDE"] and not found["CUDA_INCLUDE"]:
        found["CUDA_INCLUDE"] = _triton()
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
    """The folder with `header`: the one asked for and no other, or else a usual one."""
    folders = [asked] if asked else USUAL
    found = next((Path(each) for each in folders if Path(each, header).is_file()), None)
    return found and found.resolve()


def _triton() -> Path | None:
    """Triton brings CUDA's headers along."""
    spec = find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    found = Path(spec.origin).parent / "backends/nvidia/include"
    return found if (found / "cuda.h").is_file() else None
