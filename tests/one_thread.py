"""One thread a process, for work that runs in several processes side by side.

ONNX Runtime starts a thread for each core, and idle threads spin: processes side by side then take
each other's cores. It has no environment variable for the number.
"""

import os
from contextlib import suppress

import torch


def one_thread() -> None:
    """Give torch, OpenMP and each later session of ONNX Runtime one thread in this process."""
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with suppress(ImportError):
        import onnxruntime

        class OneThread(onnxruntime.SessionOptions):
            """Session options that ask for one thread."""

            def __init__(self) -> None:
                super().__init__()
                self.intra_op_num_threads = 1

        onnxruntime.SessionOptions = OneThread
