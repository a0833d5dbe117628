"""Let a torchvision that was built for CUDA import beside a torch that was not.

transformers resizes images by torchvision, whose wheel on PyPI wants CUDA libraries: beside a CPU
build of torch its compiled ops do not load, and its import fails at the first of them. Resizing
needs none: it is torch's own. So their names are declared here, without kernels.
"""

import importlib

import torch

_KEPT: list[torch.library.Library] = []  # what a library defines goes with it


def declare_torchvision_ops() -> None:
    """Call before transformers is imported; nothing where torchvision imports, or is not there."""
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
