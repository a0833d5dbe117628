"""Rows of tokens from a file: what calibration and evaluation run on."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moec.runtime.text import open_text
from moec.spec.errors import MoecError
from moec.spec.model import ModelSpec

#: tokens of a row that is cut from a stream
WINDOW = 512


def read_token_file(path: str | Path, spec: ModelSpec, folder: Path) -> Tensor:
    """Rows int64 [rows, length] of a file: .npy or .json with ids, .txt with text.

    A row or a text is a stream, cut into windows of 512 tokens; rows stay as they are. Text is
    encoded by the tokenizer in `folder`.

    Raises:
        MoecError: no such file, another kind of file, or tokens that are none of `spec`.
    """
    path = Path(path)
    expected = "integers [tokens] or [rows, tokens] in .npy or .json, or text in .txt"
    fix = "write token ids with numpy.save, or name a text file"
    try:
        if path.suffix == ".npy":
            values = np.load(path, allow_pickle=False)
        elif path.suffix == ".json":
            values = np.asarray(json.loads(path.read_text(encoding="utf-8")))
        elif path.suffix == ".txt":
            values = np.asarray(open_text(folder).encode(path.read_text(encoding="utf-8")))
        else:
            raise ValueError(f"a {path.suffix or 'nameless'} file")
    except (OSError, ValueError, RecursionError) as error:
        raise MoecError(path, " ".join(str(error).split()), expected, fix) from None
    if values.dtype.kind not in "iu" or values.ndim not in (1, 2) or not values.size:
        raise MoecError(path, f"{values.dtype} {list(values.shape)}", expected, fix)
    if values.ndim == 1:
        length = min(WINDOW, len(values))
        values = values[: len(values) // length * length].reshape(-1, length)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= spec.text.vocab:
        bad = low if low < 0 else high
        raise MoecError(path, f"token {bad}", f"0 to {spec.text.vocab - 1}", "use its tokenizer")
    return torch.from_numpy(values.astype(np.int64))
