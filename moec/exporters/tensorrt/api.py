"""TensorRT 11 and TensorRT-RTX as one API: what is installed, and what it can aim at.

What one of the two lacks is asked for with hasattr, never by version.
"""

import ctypes
import os
from importlib import import_module
from typing import Any

from moec.exporters.tensorrt.preload import preload
from moec.spec.errors import MoecError, refuse

#: module -> what people call it, and the extra of this package that installs it
PACKAGES = {
    "tensorrt": ("TensorRT", "pip install 'moec[tensorrt]'"),
    "tensorrt_rtx": ("TensorRT-RTX", "pip install 'moec[tensorrt-rtx]'"),
}

_MAJOR, _MINOR = 75, 76  # CUdevice_attribute: compute capability


def load(package: str) -> Any:
    """The module of `package`.

    Raises:
        MoecError: it is not installed, or its libraries do not load.
    """
    title, install = PACKAGES[package]
    try:
        return import_module(package)
    except (ImportError, OSError) as error:
        refuse(title, error, f"the package {package}", install, exit_code=3)


def new_builder(trt: Any, log: Any) -> Any:
    """A builder that reports to `log`.

    Raises:
        MoecError: TensorRT proper makes none where there is no GPU.
    """
    try:
        return trt.Builder(log)
    except TypeError:  # how the bindings say that the library gave them nothing
        raise no_gpu(trt, log.errors[0] if log.errors else "no builder") from None


def aim(trt: Any, config: Any, names: tuple[str, ...]) -> None:
    """Build for the architectures `names`, or for the GPU here where there are none.

    Raises:
        MoecError: this package cannot choose, or has no such architecture; or no GPU is here.
    """
    if not hasattr(config, "num_compute_capabilities"):
        if names:
            refuse(
                f"architectures {', '.join(names)}",
                f"{_title(trt)}, which builds for the GPU that it runs on",
                "no architectures, or TensorRT-RTX",
                "leave the architectures out",
            )
        return
    # With no names TensorRT-RTX builds even so: without a GPU for nobody knows what, and for a GPU
    # that it does not run on.
    chosen = names or (_gpu_here(),)
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


def _gpu_here() -> str | None:
    """The architecture of the first GPU, as the driver has it, such as "SM89"."""
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
    """What engines can be built for on any machine; () where that is the GPU here alone."""
    if not hasattr(trt, "ComputeCapability"):
        return ()
    members = trt.ComputeCapability.__members__
    return tuple(name for name in members if name.startswith("SM"))


def add_plugins(trt: Any, paths: tuple[str, ...], log: Any) -> None:
    """Load the plugin libraries at `paths`.

    Raises:
        MoecError: one is missing, or is no plugin library.
    """
    if paths and trt.__name__ == "tensorrt_rtx":
        preload()
    registry = trt.get_plugin_registry()
    for path in paths:
        if registry.load_library(os.path.abspath(path)) is None:
            found = log.errors[-1] if log.errors else "it does not load"
            refuse(path, found, "a library of TensorRT plugins", "build the plugins again")


def no_gpu(trt: Any, found: str) -> MoecError:
    """The refusal where a build needs a GPU that is not there."""
    can = architectures(trt)
    return MoecError(
        f"{_title(trt)} {trt.__version__}",
        found,
        f"a GPU, or architectures to build for: {', '.join(can)}" if can else "a GPU",
        "name the architectures" if can else "build on the machine that runs the engine",
        exit_code=3,
    )


def _title(trt: Any) -> str:
    return PACKAGES[trt.__name__][0]
