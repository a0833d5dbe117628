"""Let a torchvision that was built for CUDA be imported with a CPU build of torch.

transformers resizes images with torchvision. torchvision's wheel on PyPI needs CUDA libraries.
With a CPU build of torch its compiled ops do not load, and importing it fails at the first of them.
Resizing uses none of these ops. This module therefore declares their names, without kernels.
"""

import importlib

import torch

_KEPT: list[torch.library.Library] = []  # a deleted library takes its ops along


def declare_torchvision_ops() -> None:
    """Declare the ops, if torchvision needs it. Call this before importing transformers."""
    try:
        importlib.import_module("torchvision")
    except ImportError:
        pass
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
        for op in ("nms", "qnms"):
            schema = f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            library.define(schema)  # type: ignore[no-untyped-call]
        _KEPT.append(library)
        importlib.import_module("torchvision")
