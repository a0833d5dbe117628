"""Run the vision tower on image tiles, few enough at once."""

import torch
from torch import Tensor

from moec.runtime.engines.engine import Run
from moec.spec import names

#: image tiles that go through the vision tower in one call at most, to bound its memory
TILES = 8


def features_of(run: Run, tiles: Tensor, most: int) -> Tensor:
    """The features of tiles, float32 [tiles, channels, height, width], on the host: [tokens, dim].

    A call has at most `most` tiles, and at most `TILES`.
    """
    pieces = torch.split(tiles, min(TILES, most))
    return torch.cat(
        [run({names.PIXEL_VALUES: each})[names.IMAGE_FEATURES].cpu() for each in pieces]
    )
