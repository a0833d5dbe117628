"""Tensors of one file share a mapping, which keeps the file open."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import moec
from moec.weights import fp8
from moec.weights.random import write_random_checkpoint
from moec.weights.shard import read_shard
from moec.weights.view import view
from tests.small import SMALL


def test_a_file_of_many_tensors_is_opened_once(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({f"t{i}": torch.full((3,), float(i)) for i in range(200)}, file)
    before = len(os.listdir("/proc/self/fd"))
    views = {name: view(each) for name, each in read_shard(file).tensors.items()}
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    assert all((each == int(name[1:])).all() for name, each in views.items())
    again = view(read_shard(file).tensors["t3"])
    assert again.data_ptr() == views["t3"].data_ptr()


def test_a_write_to_a_mapped_tensor_ends_the_process(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"t": torch.ones(3)}, file)
    code = (
        "import sys, warnings; warnings.simplefilter('error')\n"
        "from pathlib import Path\n"
        "from moec.weights.shard import read_shard\n"
        "from moec.weights.view import view\n"
        "t = view(read_shard(Path(sys.argv[1])).tensors['t'])\n"
        "print(t.sum().item(), flush=True)\n"
        "t /= 2\n"
        "print('written')"
    )
    run = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (-signal.SIGSEGV, "3.0\n"), run.stderr


@pytest.mark.parametrize("along", ["row", "column", "all", "block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantising_leaves_the_rows_as_they_are(along: str, dtype: torch.dtype) -> None:
    rows = torch.randn(8, 12, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = rows.clone()
    scale = fp8.scales(fp8.magnitudes(rows, along, 4), torch.float32)
    fp8.quantise(rows, scale, along, 4, torch.empty(rows.shape, dtype=torch.float8_e4m3fn))
    assert rows.equal(before)


@pytest.mark.full
@pytest.mark.parametrize(("target", "precision"), [("onnx", "fp8"), ("ort", "int8")])
def test_building_and_proving_leave_a_held_checkpoint_as_it_is(
    tmp_path: Path, target: str, precision: str
) -> None:
    spec = SMALL.model_copy(update={"dtype": "fp32"})
    write_random_checkpoint(spec, tmp_path / "in")
    entries = read_shard(tmp_path / "in" / "model.safetensors").tensors
    held = {name: view(each) for name, each in entries.items()}
    before = {name: each.clone() for name, each in held.items()}
    art = moec.export(tmp_path / "in", target=target, precision=precision, out=tmp_path / "out")
    assert moec.validate(art.path).passed
    assert all(each.equal(before[name]) for name, each in held.items())
