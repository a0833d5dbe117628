"""Let TensorRT-RTX's ONNX parser find its own library, without which plugin nodes abort it.

The parser opens "libtensorrt_rtx.so", but the wheel only has "libtensorrt_rtx.so.1". The dynamic
linker finds a loaded library by the name that it gives itself (its soname). `preload` therefore
makes and loads an empty library with the missing name, which depends on the real one. It changes
nothing in the installation.
"""

import ctypes
import os
import shutil
import subprocess
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from moec.spec.errors import refuse

NAME = "libtensorrt_rtx.so"


@cache
def preload() -> None:
    """Make and load the library, once in a process.

    Call it after `import tensorrt_rtx` and before the first model is parsed.

    Raises:
        MoecError: TensorRT-RTX was not installed from a wheel, or there is no C compiler (exit code
            3).
    """
    where = "plugins on TensorRT-RTX"
    spec = find_spec("tensorrt_rtx_libs")
    folders = [] if spec is None else spec.submodule_search_locations or []
    real = next((path for each in folders for path in Path(each).glob(f"{NAME}.*")), None)
    if real is None:
        refuse(
            where,
            f"no package with {NAME}.1",
            "the package tensorrt-rtx-cu13",
            "pip install tensorrt-rtx-cu13",
            exit_code=3,
        )
    names = (os.environ.get("CC"), "cc", "gcc", "clang")
    compiler = next((each for each in names if each and shutil.which(each)), None)
    if compiler is None:
        next_step = "install a C compiler, or set CC"
        refuse(where, "no C compiler", "cc, gcc or clang", next_step, exit_code=3)
    with TemporaryDirectory() as folder:
        source, library = Path(folder, "empty.c"), Path(folder, NAME)
        source.touch()
        command = [
            compiler,
            "-shared",
            "-fPIC",
            f"-Wl,-soname,{NAME}",
            "-o",
            str(library),
            str(source),
            "-Wl,--no-as-needed",
            str(real),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            refuse(
                where,
                done.stderr.strip() or f"{compiler} failed",
                "an empty library from the C compiler",
                f"check that {compiler} can link {real}",
                exit_code=3,
            )
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # stays loaded without its file
    ctypes.CDLL(NAME)  # load it as the parser will
