"""Whether there is a GPU for our kernels; when its memory is full; and the way to the host."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import Tensor

from moec.spec.errors import refuse


def check_device(device: str, what: str) -> None:
    """Refuse a device, for `what`, that there is not, or for which a package is missing.

    Raises:
        MoecError: no GPU or no Triton (exit code 3), or neither "cpu" nor "cuda".
    """
    if device == "cpu":
        return
    if device != "cuda":
        refuse(f"device {device}", "no such device", "cpu or cuda", "choose one of them")
    found = None
    if not torch.cuda.is_available():
        found = f"torch {torch.__version__}, which finds no GPU"
    elif find_spec("triton") is None:
        found = "no package triton"
    elif torch.cuda.get_device_capability() < (8, 9):
        found = f"{torch.cuda.get_device_name()}, which has no FP8"
    if found:
        refuse(
            f"device cuda: {what}",
            found,
            "a GPU with FP8, torch with CUDA and triton",
            "use device cpu, or pip install triton and a torch with CUDA",
            exit_code=3,
        )


@contextmanager
def memory_for(what: str) -> Iterator[None]:
    """Run a block that needs memory of the GPU, and say clearly if that is not there.

    torch, CUDA and Triton each have an error of their own for this; all have the words in common.

    Raises:
        MoecError: how much was wanted and how much is free (exit code 3).
    """
    try:
        yield
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        # What was asked for, what the GPU has; then follow torch's own accounts and advice.
        found = ". ".join(str(error).split(". ")[:3])
        refuse(
            f"device cuda: {what}",
            found,
            "memory for it",
            "use a smaller batch or context: moec plan says what they take",
            exit_code=3,
        )


def on_host(values: Tensor) -> Callable[[], Tensor]:
    """Start to copy `values` to the host; the result waits for that, not for work begun since."""
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
