"""The launcher from Python, without a runtime around it."""

import ctypes
import subprocess
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import triton

CUDA_INCLUDE = Path(triton.__file__).parent / "backends/nvidia/include"
SOURCES = ("program.cpp", "driver.cpp", "launcher.cpp", "surface.cpp")
ROOM = 4096


def compile_library(out: Path) -> Path:
    folder = Path(str(files("moec.kernels.launcher") / ""))
    subprocess.run(
        ["g++", "-std=c++17", "-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra",
         "-Werror", f"-I{CUDA_INCLUDE}", *(folder / name for name in SOURCES), "-ldl", "-o", out],
        check=True,
    )  # fmt: skip
    return out


def compile_driver(folder: Path) -> Path:
    """A libcuda.so.1 in `folder` that runs nothing and writes down what it is asked for."""
    source = Path(__file__).with_name("fake_driver.c")
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-Wall", f"-I{CUDA_INCLUDE}", "-Wl,-soname,libcuda.so.1",
         source, "-o", folder / "libcuda.so.1"],
        check=True,
    )  # fmt: skip
    return folder


class LaunchError(Exception):
    """What the launcher said."""


class Launcher:
    """`moec_open` and what goes with it; `program` stays where it is for as long."""

    def __init__(self, library: Path, program: bytes) -> None:
        self.program = ctypes.create_string_buffer(program, len(program))
        self._message = ctypes.create_string_buffer(ROOM)
        found = self._library = ctypes.CDLL(str(library))
        number, pointer = ctypes.c_int64, ctypes.c_void_p
        text = ctypes.c_char_p, ctypes.c_size_t
        found.moec_open.argtypes = (pointer, ctypes.c_size_t, *text)
        found.moec_open.restype = pointer
        found.moec_close.argtypes = (pointer,)
        found.moec_workspace.argtypes = (pointer, number)
        found.moec_workspace.restype = number
        found.moec_prepare.argtypes = (pointer, *text)
        found.moec_room.argtypes = (pointer, pointer, pointer, *text)
        found.moec_run.argtypes = (
            pointer,
            pointer,
            pointer,
            ctypes.c_uint64,
            number,
            pointer,
            *text,
        )
        self._handle = found.moec_open(self.program, len(program), self._message, ROOM)
        self._check(not self._handle)

    @property
    def at(self) -> int:
        """Where the program's bytes are."""
        return ctypes.addressof(self.program)

    def workspace(self, tokens: int) -> int:
        return int(self._library.moec_workspace(self._handle, tokens))

    def room(self, variables: Sequence[int]) -> int:
        """The bytes of workspace of a call; it needs a driver."""
        found = ctypes.c_int64()
        values = (ctypes.c_int64 * 5)(*variables)
        self._check(
            self._library.moec_room(self._handle, values, ctypes.byref(found), self._message, ROOM)
        )
        return found.value

    def prepare(self) -> None:
        self._check(self._library.moec_prepare(self._handle, self._message, ROOM))

    def run(
        self,
        variables: int | Sequence[int],
        given: list[int],
        workspace: int,
        room: int,
        stream: int = 0,
    ) -> None:
        """`variables` are in the order of `VARIABLES`; a number alone is the tokens."""
        values = (variables,) if isinstance(variables, int) else variables
        sizes = (ctypes.c_int64 * 5)(*values)
        pointers = (ctypes.c_uint64 * len(given))(*given)
        self._check(
            self._library.moec_run(
                self._handle, sizes, pointers, workspace, room, stream, self._message, ROOM
            )
        )

    def close(self) -> None:
        self._library.moec_close(self._handle)

    def _check(self, failed: int) -> None:
        if failed:
            raise LaunchError(self._message.value.decode())
