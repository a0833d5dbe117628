"""Turn what callers give a session into tensors of token ids and image tiles, and check it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moec.spec.errors import MoecError, refuse
from moec.spec.model import ModelSpec

#: token ids that are no tensor: an array, rows, or one row
Arrays = np.ndarray[Any, Any] | Sequence[Sequence[int]] | Sequence[int]
Ids = Tensor | Arrays
Pixels = Tensor | np.ndarray[Any, Any]

_NO_IDS = (torch.bool, torch.complex64, torch.complex128)


def read_ids(input_ids: Ids, lengths: Ids | None, vocab: int) -> tuple[Tensor, Tensor]:
    """Make right-padded token ids, int64 [B, S], and the sequences' lengths, int64 [B].

    Raises:
        MoecError: `input_ids` are not token ids from 0 to `vocab` - 1, or `lengths` do not fit
            them.
    """
    try:
        ids, counts = _padded(input_ids, lengths)
    except (TypeError, ValueError, OverflowError) as error:
        expected = "integers [batch, sequence], or lists of integers"
        raise _ids_error(f"{error}", expected) from None
    check_ids(ids, vocab)
    return ids, counts


def check_ids(ids: Tensor, vocab: int) -> None:
    """Refuse token ids that are not from 0 to `vocab` - 1.

    Raises:
        MoecError: the message names one of them.
    """
    if ids.min() < 0 or ids.max() >= vocab:
        bad = int(ids.min() if ids.min() < 0 else ids.max())
        raise _ids_error(f"token {bad}", f"tokens from 0 to {vocab - 1}")


def read_tiles(pixel_values: Pixels, spec: ModelSpec) -> Tensor:
    """Make image tiles, float32 [tiles, channels, height, width], with finite values.

    Raises:
        MoecError: `spec` has no vision tower, or `pixel_values` are not image tiles for it.
    """
    vision = spec.vision
    if vision is None:
        refuse(
            "pixel_values",
            "images",
            f"no images, because {spec.name} has no vision tower",
            "leave pixel_values out",
        )
    shape = (vision.channels, vision.image, vision.image)
    expected = f"float32 [tiles, {', '.join(map(str, shape))}], normalised"
    if not isinstance(pixel_values, Tensor | np.ndarray):
        found = f"{type(pixel_values).__name__} {str(pixel_values)[:40]}"
        raise _pixels_error(found, f"a tensor or array, {expected}")
    size = tuple(pixel_values.shape)
    dtype = pixel_values.dtype
    real = dtype.is_floating_point if isinstance(dtype, torch.dtype) else dtype.kind == "f"
    if not real or len(size) != 4 or size[1:] != shape or not size[0]:
        raise _pixels_error(f"{dtype} {list(size)}", expected)
    try:
        if isinstance(pixel_values, np.ndarray):  # of any byte order and strides
            with np.errstate(over="ignore"):  # infinite values are refused below
                pixel_values = torch.from_numpy(np.array(pixel_values, np.float32, order="C"))
        tiles = pixel_values.detach().cpu().float().contiguous()
        finite = bool(tiles.isfinite().all())
    except (RuntimeError, NotImplementedError) as error:  # a sparse tensor, for example
        raise _pixels_error(f"{dtype} {list(size)}: {error}", expected) from None
    if not finite:
        raise _pixels_error("values that are not finite in float32", expected)
    return tiles


def _padded(input_ids: Ids, lengths: Ids | None) -> tuple[Tensor, Tensor]:
    if not isinstance(input_ids, Tensor | np.ndarray):
        given = list(input_ids)
        nested = [row if isinstance(row, Sequence) else given for row in given]
        rows = nested if given and isinstance(given[0], Sequence) else [given]
        lengths = [len(row) for row in rows] if lengths is None else lengths
        longest = max(map(len, rows), default=0)
        input_ids = np.array([list(row) + [0] * (longest - len(row)) for row in rows])
    ids = torch.as_tensor(input_ids)
    if ids.dim() != 2 or not ids.numel() or ids.dtype.is_floating_point or ids.dtype in _NO_IDS:
        raise _ids_error(f"{ids.dtype} {list(ids.shape)}", "integers [batch, sequence], not empty")
    ids = ids.long().cpu()
    counts = torch.full((len(ids),), ids.shape[1]) if lengths is None else torch.as_tensor(lengths)
    if counts.is_floating_point() or counts.shape != ids.shape[:1]:
        raise _ids_error(f"lengths {counts.tolist()}", "one integer for each sequence")
    if counts.min() < 1 or counts.max() > ids.shape[1]:
        raise _ids_error(f"lengths {counts.tolist()}", f"lengths from 1 to {ids.shape[1]}")
    return ids, counts.long().cpu()


def _pixels_error(found: str, expected: str) -> MoecError:
    return MoecError("pixel_values", found, expected, "make them from images: moec.encode")


def _ids_error(found: str, expected: str) -> MoecError:
    return MoecError("input_ids", found, expected, "check the tokenizer, or the shape of the batch")


def like(given: object, result: Tensor) -> Tensor | np.ndarray[Any, Any]:
    """`result` as a tensor if the caller gave one, else as a numpy array."""
    return result if isinstance(given, Tensor) else result.numpy()
