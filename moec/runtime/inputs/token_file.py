"""Read sequences of tokens from a file, for calibration and evaluation."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from moec.runtime.inputs.text import open_text
from moec.spec.bounded.limits import TOKENS, TOKENS_JSON, TOKENS_NPY, TOKENS_TEXT
from moec.spec.bounded.read import open_file, parse_json, read_bytes
from moec.spec.errors import refuse
from moec.spec.model import ModelSpec

#: tokens of each sequence that is cut from a text
WINDOW = 512

Array = np.ndarray[Any, Any]
#: versions of the .npy format; the third has names of fields, which tokens do not need
_HEADERS: dict[tuple[int, int], Callable[..., tuple[tuple[int, ...], bool, np.dtype[Any]]]] = {
    (1, 0): npy.read_array_header_1_0,
    (2, 0): npy.read_array_header_2_0,
}
_NPY_HEADER = 10_000  # bytes
_EXPECTED = "integers [tokens] or [rows, tokens] in .npy or .json, or text in .txt"
_FIX = "write token ids with numpy.save, or name a text file"


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
    readers: dict[str, Callable[[Path], Any]] = {
        ".npy": _npy,
        ".json": _json,
        ".txt": lambda path: _text(path, folder),
    }
    if path.suffix not in readers:
        found = f"a {path.suffix} file" if path.suffix else "a file without a suffix"
        refuse(path, found, _EXPECTED, _FIX)
    try:
        values = readers[path.suffix](path)
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        refuse(path, f"{error}"[:400] or type(error).__name__, _EXPECTED, _FIX)
    return _rows(values, path, spec)


def _npy(path: Path) -> Array:
    """Read a .npy file, whose header must say what the file's size allows.

    numpy allocates what the header says before it reads, and a header may say anything.
    """
    with open_file(path, TOKENS_NPY, _EXPECTED, _FIX) as file:
        version = npy.read_magic(file)
        if version not in _HEADERS:
            raise ValueError(f"version {version} of the .npy format")
        try:
            shape, fortran, dtype = _HEADERS[version](file, max_header_size=_NPY_HEADER)
        except Exception as error:  # numpy evaluates a literal: SyntaxError, TokenError, ...
            raise ValueError(f"a broken header: {error}") from None
        if dtype.kind not in "iu":  # nor structures, nor objects, which would be pickles
            raise ValueError(f"{dtype!s:.80} {list(shape)!s:.80}")
        left = os.fstat(file.fileno()).st_size - file.tell()
        if math.prod(shape) > TOKENS:
            raise ValueError(f"{list(shape)!s:.80}; over {TOKENS:,} tokens in one file")
        if len(shape) > 2 or min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize > left:
            raise ValueError(f"{dtype} {list(shape)!s:.80} in {left} bytes")
        values: Array = np.frombuffer(file.read(math.prod(shape) * dtype.itemsize), dtype)
    return values.reshape(shape, order="F" if fortran else "C")


def _json(path: Path) -> Array:
    raw = read_bytes(path, TOKENS_JSON.bytes, _EXPECTED, _FIX)
    return np.asarray(parse_json(raw, path, TOKENS_JSON, _FIX))


def _text(path: Path, folder: Path) -> Array:
    text = read_bytes(path, TOKENS_TEXT, _EXPECTED, _FIX).decode()
    return np.asarray(open_text(folder).encode(text) if text else [])


def _rows(values: np.ndarray[Any, Any], where: object, spec: ModelSpec) -> Tensor:
    if values.dtype.kind not in "iu" or values.ndim not in (1, 2) or not values.size:
        refuse(where, f"{values.dtype} {list(values.shape)}"[:200], _EXPECTED, _FIX)
    if values.ndim == 1:
        length = min(WINDOW, len(values))
        values = values[: len(values) // length * length].reshape(-1, length)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= spec.text.vocab:
        bad = low if low < 0 else high
        expected = f"tokens from 0 to {spec.text.vocab - 1}"
        refuse(where, f"token {bad}", expected, "use the tokenizer of the checkpoint")
    return torch.from_numpy(values.astype(np.int64))
