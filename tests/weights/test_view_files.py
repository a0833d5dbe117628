"""Tensors of one file share a mapping, which keeps the file open."""

import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from moec.weights.shard import read_shard
from moec.weights.view import view


def test_a_file_of_many_tensors_is_opened_once(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({f"t{i}": torch.full((3,), float(i)) for i in range(200)}, file)
    before = len(os.listdir("/proc/self/fd"))
    views = {name: view(each) for name, each in read_shard(file).tensors.items()}
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    assert all((each == int(name[1:])).all() for name, each in views.items())
    views["t3"][0] = 9
    assert view(read_shard(file).tensors["t3"]).tolist() == [9, 3, 3]  # shared, in memory alone
    del views
    assert view(read_shard(file).tensors["t3"]).tolist() == [3, 3, 3]
