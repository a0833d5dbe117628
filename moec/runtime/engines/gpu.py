"""Check for a supported GPU, report full GPU memory, and copy results to the host."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import Tensor

from moec.spec.errors import refuse


def check_device(device: str, what: str, fp8: bool = True, otherwise: str = "") -> None:
    """Refuse a device that does not exist here, or for which a package is missing.

    `what` names what needs the device, for the message, and `otherwise` what to do without it.
    Without `fp8` no kernel of moec has to run.

    Raises:
        MoecError: `device` is neither "cpu" nor "cuda"; or it is "cuda" and there is no GPU, or for
            `fp8` none with FP8 or no Triton (exit code 3).
    """
    if device == "cpu":
        return
    if device != "cuda":
        refuse(f"device {device}", "no such device", "cpu or cuda", "choose one of them")
    found = None
    if not torch.cuda.is_available():
        found = f"torch {torch.__version__}, which finds no GPU"
    elif not fp8:
        return
    elif find_spec("triton") is None:
        found = "no package triton"
    elif torch.cuda.get_device_capability() < (8, 9):
        found = f"{torch.cuda.get_device_name()}, which has no FP8"
    if found:
        refuse(
            f"device cuda: {what}",
            found,
            "a GPU with FP8, torch with CUDA and triton" if fp8 else "a GPU, and torch with CUDA",
            otherwise
            or f"use device cpu, or pip install {'triton and ' if fp8 else ''}a torch with CUDA",
            exit_code=3,
        )


@contextmanager
def memory_for(what: str) -> Iterator[None]:
    """Run a block that needs GPU memory, and turn an out-of-memory error into a clear message.

    torch, CUDA and Triton raise different errors, which all contain "out of memory".

    Raises:
        MoecError: there is not enough memory; the message says how much was asked for and how much
            is free (exit code 3).
    """
    try:
        yield
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        # The first sentences say what was asked for and what the GPU has. The rest is about torch.
        found = ". ".join(str(error).split(". ")[:3])
        refuse(
            f"device cuda: {what}",
            found,
            "enough GPU memory",
            "use a smaller batch or context; moec plan prints the memory that they need",
            exit_code=3,
        )


def on_host(values: Tensor) -> Callable[[], Tensor]:
    """Start to copy `values` to the host; return a function that waits and returns the copy.

    The function waits for this copy only, not for GPU work that started later.
    """
    if not values.is_cuda:
        return lambda: values
    copied = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    copied.copy_(values, non_blocking=True)
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    done.record()

    def arrived() -> Tensor:
        done.synchronize()
        return copied

    return arrived
