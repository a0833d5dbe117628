"""Read sequences of tokens from a file, for calibration and evaluation."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moec.runtime.inputs.text import open_text
from moec.spec.errors import refuse
from moec.spec.model import ModelSpec

#: tokens of each sequence that is cut from a text
WINDOW = 512


def read_rows(source: str | Path | Tensor, spec: ModelSpec, folder: Path) -> Tensor:
    """Read sequences of token ids, int64 [sequences, length], from a tensor or a file.

    A file is .npy or .json with token ids, or .txt with text that the tokenizer in `folder`
    encodes. A text or a single list of ids is cut into sequences of 512 tokens; a shorter rest at
    the end is dropped.

    Raises:
        MoecError: there is no such file, it is of another kind, or it holds tokens that are not in
            the vocabulary of `spec`.
    """
    if isinstance(source, Tensor):
        return _rows(source.cpu().numpy(), "tokens", spec)
    path = Path(source)
    try:
        if path.suffix == ".npy":
            values = np.load(path, allow_pickle=False)
        elif path.suffix == ".json":
            values = np.asarray(json.loads(path.read_text(encoding="utf-8")))
        elif path.suffix == ".txt":
            text = path.read_text(encoding="utf-8")
            values = np.asarray(open_text(folder).encode(text) if text else [])
        else:
            raise ValueError(f"a {path.suffix} file" if path.suffix else "a file without a suffix")
    except (OSError, ValueError, RecursionError) as error:
        refuse(path, " ".join(str(error).split()), _EXPECTED, _FIX)
    return _rows(values, path, spec)


_EXPECTED = "integers [tokens] or [rows, tokens] in .npy or .json, or text in .txt"
_FIX = "write token ids with numpy.save, or name a text file"


def _rows(values: np.ndarray[Any, Any], where: object, spec: ModelSpec) -> Tensor:
    if values.dtype.kind not in "iu" or values.ndim not in (1, 2) or not values.size:
        refuse(where, f"{values.dtype} {list(values.shape)}", _EXPECTED, _FIX)
    if values.ndim == 1:
        length = min(WINDOW, len(values))
        values = values[: len(values) // length * length].reshape(-1, length)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= spec.text.vocab:
        bad = low if low < 0 else high
        expected = f"tokens from 0 to {spec.text.vocab - 1}"
        refuse(where, f"token {bad}", expected, "use the tokenizer of the checkpoint")
    return torch.from_numpy(values.astype(np.int64))
