"""Rows of tokens from files, and files that are none."""

import json
from pathlib import Path

import numpy as np
import pytest

import moec
from moec.runtime.inputs.token_file import WINDOW, read_rows
from moec.spec.errors import MoecError

SPEC = moec.load_spec("tiny-scout")


def test_ids_and_text_become_rows(tiny: Path, tmp_path: Path) -> None:
    stream = np.arange(1300, dtype=np.int32)
    np.save(tmp_path / "stream.npy", stream)
    rows = read_rows(tmp_path / "stream.npy", SPEC, tiny)
    assert rows.shape == (2, WINDOW) and rows.flatten().tolist() == list(range(2 * WINDOW))
    np.save(tmp_path / "rows.npy", stream[:60].reshape(4, 15))
    assert read_rows(tmp_path / "rows.npy", SPEC, tiny).shape == (4, 15)
    (tmp_path / "short.json").write_text(json.dumps([3, 1, 2]))
    assert read_rows(tmp_path / "short.json", SPEC, tiny).tolist() == [[3, 1, 2]]
    (tmp_path / "text.txt").write_text("import os\n" * 50)
    rows = read_rows(tmp_path / "text.txt", SPEC, tiny)
    assert rows.shape[0] == 1 and rows.max() < SPEC.text.vocab


BAD: dict[str, tuple[str, bytes, str]] = {
    "no such file": ("none.npy", b"", "No such file"),
    "another kind": ("rows.csv", b"1,2", ".csv"),
    "no numpy file": ("rows.npy", b"abc", "rows.npy"),
    "broken JSON": ("rows.json", b"[1,", "rows.json"),
    "ragged rows": ("rows.json", b"[[1], [1, 2]]", "rows.json"),
    "floats": ("rows.json", b"[1.5]", "float64"),
    "an object": ("rows.json", b'{"a": 1}', "rows.json"),
    "nothing": ("rows.json", b"[]", "rows.json"),
    "a token out of range": ("rows.json", b"[1, 4096]", "token 4096"),
    "a token below zero": ("rows.json", b"[1, -2]", "token -2"),
    "text that is none": ("text.txt", b"\xff\xfe", "text.txt"),
    "nested without end": ("rows.json", b"[" * 100_000, "rows.json"),
}


@pytest.mark.parametrize("what", BAD)
def test_other_files_are_refused(what: str, tiny: Path, tmp_path: Path) -> None:
    name, content, named = BAD[what]
    if content:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(MoecError) as caught:
        read_rows(tmp_path / name, SPEC, tiny)
    assert named in str(caught.value)
