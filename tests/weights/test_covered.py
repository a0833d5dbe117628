"""Every byte of a shard is of its header or of one tensor, as safetensors itself demands."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError, safe_open

from moec.weights.checkpoint import read_checkpoint
from moec.weights.shard import read_shard
from tests.refusals import refusal


def row(start: int, end: int) -> dict[str, Any]:
    return {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}


#: (rows of the header, bytes of data)
SOUND = {
    "side by side": ({"a": row(0, 4), "b": row(4, 8)}, 8),
    "in another order": ({"b": row(4, 8), "a": row(0, 4)}, 8),
    "an empty tensor first": ({"a": row(0, 4), "z": row(0, 0)}, 4),
    "an empty tensor between": ({"a": row(0, 4), "b": row(4, 8), "z": row(4, 4)}, 8),
    "an empty tensor last": ({"a": row(0, 4), "z": row(4, 4)}, 4),
    "no tensor": ({}, 0),
}
#: the same, and what the message must name
WRONG = {
    "bytes behind the last tensor": ({"a": row(0, 4), "b": row(4, 8)}, 9, "1 bytes behind"),
    "bytes and no tensor": ({}, 3, "3 bytes behind"),
    "a hole": ({"a": row(0, 4), "b": row(6, 8)}, 8, ": b\n  found:    2 bytes before"),
    "a hole at the start": ({"a": row(2, 4), "b": row(4, 8)}, 8, ": a\n  found:    2 bytes"),
    "an overlap": ({"a": row(0, 4), "b": row(2, 8)}, 8, ": b\n  found:    it shares"),
    "the same bytes": ({"a": row(0, 4), "b": row(0, 4)}, 4, "it shares"),
    "an empty tensor inside another": ({"a": row(0, 4), "z": row(2, 2)}, 4, ": z"),
    "an empty tensor beyond": ({"a": row(0, 4), "z": row(9, 9)}, 4, ": z"),
    "cut short": ({"a": row(0, 4), "b": row(4, 8)}, 7, "cut short"),
}


def write(folder: Path, rows: dict[str, Any], size: int) -> Path:
    raw = json.dumps(rows).encode()
    path = folder / "model.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(size))
    return path


@pytest.mark.parametrize("case", SOUND)
def test_a_sound_file_is_read_as_safetensors_reads_it(tmp_path: Path, case: str) -> None:
    path = write(tmp_path, *SOUND[case])
    with safe_open(path, "np") as file:
        assert sorted(read_shard(path).tensors) == sorted(file.keys())


@pytest.mark.parametrize("case", WRONG)
def test_what_safetensors_refuses_is_refused(tmp_path: Path, case: str) -> None:
    rows, size, names = WRONG[case]
    path = write(tmp_path, rows, size)
    with pytest.raises(SafetensorError):
        safe_open(path, "np").__enter__()
    error = refusal(lambda: read_checkpoint(tmp_path), names)
    assert str(error.where).startswith(str(path))
