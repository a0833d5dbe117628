"""Let a torchvision that was built for CUDA import beside a torch that was not.

transformers resizes images by torchvision, whose wheel on PyPI wants CUDA libraries: beside a CPU
build of torch its compiled ops do not load, and its import fails at the first of them. Resizing
needs none: it is torch's own. So their names are declared here, without kernels. Import this before
transformers; it does nothing where torchvision imports, or is not installed.
"""

import importlib

import torch

try:
    importlib.import_module("torchvision")
except ImportError:
    pass
except RuntimeError:
    LIBRARY = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for op in ("nms", "qnms"):
        schema = f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    importlib.import_module("torchvision")
