"""The static scales of an FP8 build, which calibration measured, as tensors."""

from pathlib import Path

import torch
from torch import Tensor

from moec.spec.bounded.own import find_own
from moec.spec.calibration import Calibration, read_calibration, static_scales
from moec.spec.errors import refuse
from moec.spec.model import ModelSpec
from moec.weights.view import STORED

#: the file of a checkpoint that holds the result of `calibrate`
SCALES = "scales.json"


def scales_for(
    spec: ModelSpec, mode: str, scales: str | Path | Calibration | None, checkpoint: Path
) -> dict[str, Tensor]:
    """The static scales that a packed file holds beside the weights, by name.

    `scales` is what the user gave; None means the file in the folder `checkpoint`. The result is
    empty if the build does not need static scales.

    Raises:
        MoecError: the build takes no scales, a scale is missing, or its dtype cannot hold one; or
            the checkpoint's file is a link that leads out of it.
    """
    scheme = spec.scheme
    wanted = mode == "pack" and scheme is not None and scheme.static
    if scales is not None and not wanted:
        refuse(
            "--scales",
            "a build that has no static scales to find",
            "a scheme with static scales, on wide weights",
            "leave --scales out",
        )
    if scheme is None or not wanted:
        return {}
    if scales is None:
        scales = find_own(checkpoint, SCALES)
    found = (
        scales if scales is None or isinstance(scales, Calibration) else read_calibration(scales)
    )
    dtype, constants = STORED[scheme.scales], dict[str, Tensor]()
    for name, each in static_scales(spec, found).items():
        scale = torch.tensor(each, dtype=dtype).clamp(min=torch.finfo(dtype).smallest_normal)
        if not bool(scale.isfinite().all()):
            refuse(
                f"--scales: {name}",
                f"{each}, which {scheme.scales} cannot hold",
                "a finite scale",
                "use scales: fp32 in the scheme, or calibrate again",
            )
        constants[name] = scale
    return constants
