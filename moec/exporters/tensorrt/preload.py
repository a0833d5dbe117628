"""Let TensorRT-RTX's ONNX parser find its own library, without which a plugin node aborts it.

The parser opens "libtensorrt_rtx.so"; the wheel has "libtensorrt_rtx.so.1" alone. A library that is
loaded already is found by the name that it calls itself: so an empty one of that name, which needs
the real one, is made and loaded. Nothing that is installed changes.
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
    """Once in a process, after `import tensorrt_rtx` and before the first model is parsed.

    Raises:
        MoecError: no TensorRT-RTX of a wheel, or no C compiler.
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
        refuse(where, "no C compiler", "cc, gcc or clang", "install one, or set CC", exit_code=3)
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
                "a library that needs no code",
                f"see that {compiler} can link {real}",
                exit_code=3,
            )
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # stays, though its file goes
    ctypes.CDLL(NAME)  # as the parser will
