"""Image tokens in token ids [B, S], and the tiles or features that must fit them.

A sequence owns its first `lengths` tokens; image tokens in the padding after them do not count.
"""

import torch
from torch import Tensor

from moec.spec.errors import refuse
from moec.spec.model import ModelSpec


def image_mask(spec: ModelSpec, ids: Tensor, lengths: Tensor) -> Tensor:
    """Where the sequences have image tokens of their own: bool [B, S].

    It is False everywhere for a model without a vision tower.
    """
    if spec.vision is None:
        return torch.zeros_like(ids, dtype=torch.bool)
    own = torch.arange(ids.shape[1]) < lengths[:, None]
    return own & (ids == spec.tokens.image)


def check_tiles(spec: ModelSpec, ids: Tensor, lengths: Tensor, tiles: Tensor) -> None:
    """Refuse tiles [N, channels, height, width] that the image tokens are not for.

    Raises:
        MoecError: another number of image tokens, or part of a tile in a sequence.
    """
    assert spec.vision is not None
    each, counts = spec.vision.tokens, image_mask(spec, ids, lengths).sum(1)
    if int(counts.sum()) != each * len(tiles) or bool((counts % each).any()):
        rows = f", by row {counts.tolist()}" if len(ids) > 1 else ""
        refuse(
            "input_ids",
            f"{int(counts.sum())} image tokens (id {spec.tokens.image}) for {len(tiles)} "
            f"tiles of pixel_values{rows}",
            f"{each * len(tiles)}, which is {each} for each tile, and whole tiles in each row",
            "build both from one prompt and its images: moec.encode",
        )


def images_for(spec: ModelSpec, ids: Tensor, lengths: Tensor, features: Tensor) -> Tensor:
    """Return the image tokens, bool [B, S], that features [N, dim] stand for.

    Raises:
        MoecError: another number or width of features, or a model without a vision tower.
    """
    images = image_mask(spec, ids, lengths)
    expected = (int(images.sum()), spec.text.dim)
    if spec.vision is None or tuple(features.shape) != expected:
        refuse(
            "features",
            f"{list(features.shape)}",
            f"{list(expected)}, one for each image token, and a model with a vision tower",
            "take them from Session.image_features",
        )
    return images


def features_within(features: Tensor, images: Tensor, rows: slice, columns: slice) -> Tensor:
    """The features of some rows and columns; features [N, dim] has one for each True of `images`.

    `images` is bool [B, S], and the features are in its order, row by row.
    """
    order = (images.flatten().cumsum(0) - 1).view_as(images)
    return features[order[rows, columns][images[rows, columns]]]
