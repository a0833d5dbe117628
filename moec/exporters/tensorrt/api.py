"""One interface to TensorRT 11 and TensorRT-RTX: load them, choose architectures, load plugins.

Where one of the two lacks a feature, the code asks with hasattr and never by version.
"""

import ctypes
import os
from importlib import import_module
from typing import Any

from moec.exporters.tensorrt.preload import preload
from moec.spec.errors import MoecError, refuse

#: for each Python module, the product's name and the command that installs it
PACKAGES = {
    "tensorrt": ("TensorRT", "pip install 'moec[tensorrt]'"),
    "tensorrt_rtx": ("TensorRT-RTX", "pip install 'moec[tensorrt-rtx]'"),
}

_MAJOR, _MINOR = 75, 76  # CUdevice_attribute: compute capability


def load(package: str) -> Any:
    """Import the module `package`.

    Raises:
        MoecError: the package is not installed, or its libraries do not load (exit code 3).
    """
    title, install = PACKAGES[package]
    try:
        return import_module(package)
    except (ImportError, OSError) as error:
        refuse(title, error, f"the package {package}", install, exit_code=3)


def new_builder(trt: Any, log: Any) -> Any:
    """Make a builder that reports to `log`.

    Raises:
        MoecError: there is no GPU, which TensorRT needs and TensorRT-RTX does not (exit code 3).
    """
    try:
        return trt.Builder(log)
    except TypeError:  # the bindings raise it if the library returns no builder
        raise no_gpu(trt, log.errors[0] if log.errors else "no builder") from None


def select_architectures(trt: Any, config: Any, names: tuple[str, ...]) -> None:
    """Let `config` build for the architectures `names`, or for this machine's GPU if empty.

    Raises:
        MoecError: the package cannot build for other GPUs than this machine's; it does not know an
            architecture; or `names` is empty and there is no GPU.
    """
    if not hasattr(config, "num_compute_capabilities"):
        if names:
            refuse(
                f"architectures {', '.join(names)}",
                f"{_title(trt)}, which builds for the GPU that it runs on",
                "no architectures, or TensorRT-RTX, which can choose them",
                "leave the architectures out",
            )
        return
    # Without names TensorRT-RTX would build anyway: without a GPU for an unknown architecture, and
    # with a GPU even for one on which TensorRT-RTX does not run.
    chosen = names or (_architecture_of_first_gpu(),)
    if chosen == (None,):
        raise no_gpu(trt, "no CUDA driver with a GPU")
    known = trt.ComputeCapability.__members__
    config.num_compute_capabilities = len(chosen)
    for index, name in enumerate(chosen):
        if name not in architectures(trt) or not config.set_compute_capability(known[name], index):
            refuse(
                f"architectures {', '.join(names)}" if names else "the GPU here",
                f"{name}, which {_title(trt)} {trt.__version__} does not build for",
                f"{' or '.join(architectures(trt))} (compute capability 9.0, Hopper, has no"
                " TensorRT-RTX)",
                "choose among these, or build with TensorRT on the GPU itself",
            )


def _architecture_of_first_gpu() -> str | None:
    """The architecture of the first GPU, such as "SM89"; None if there is no GPU."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    failed = (
        cuda.cuInit(0)
        or cuda.cuDeviceGet(ctypes.byref(device), 0)
        or cuda.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    )
    return None if failed else f"SM{major.value}{minor.value}"


def architectures(trt: Any) -> tuple[str, ...]:
    """The architectures that can be built for on any machine.

    The result is empty for a package that builds for this machine's GPU only.
    """
    if not hasattr(trt, "ComputeCapability"):
        return ()
    members = trt.ComputeCapability.__members__
    return tuple(name for name in members if name.startswith("SM"))


def add_plugins(trt: Any, paths: tuple[str, ...], log: Any) -> None:
    """Load the plugin libraries at `paths`.

    Raises:
        MoecError: a library is missing, or is not a plugin library.
    """
    if paths and trt.__name__ == "tensorrt_rtx":
        preload()
    registry = trt.get_plugin_registry()
    for path in paths:
        if registry.load_library(os.path.abspath(path)) is None:
            found = log.errors[-1] if log.errors else "it does not load"
            refuse(path, found, "a library of TensorRT plugins", "build the plugins again")


def no_gpu(trt: Any, found: str) -> MoecError:
    """The error for a build that needs a GPU on a machine without one."""
    choices = architectures(trt)
    return MoecError(
        f"{_title(trt)} {trt.__version__}",
        found,
        f"a GPU, or architectures to build for: {', '.join(choices)}" if choices else "a GPU",
        "name the architectures" if choices else "build on the machine that runs the engine",
        exit_code=3,
    )


def _title(trt: Any) -> str:
    return PACKAGES[trt.__name__][0]
