"""The MoE kernels without a GPU: interpreted, and compiled for GPUs that are not here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moec.spec.errors import MoecError

pytest.importorskip("triton", reason="kernels need triton")
ROOT = Path(__file__).parents[2]


def test_the_kernels_are_their_twin() -> None:
    """In a process of its own: the interpreter is chosen when triton is imported."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("interpret.py")],
        cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) == 8
    for experts, tokens, error, repeats, arrived in rows:
        assert float(error) < 1e-2, (experts, tokens)
        assert (repeats, arrived) == ("True", "0")


@pytest.mark.parametrize("architecture", [89, 90, 120])
@pytest.mark.parametrize("tokens", [1, 64])
def test_every_kernel_compiles_ahead_of_time(architecture: int, tokens: int) -> None:
    from moec.kernels.compile import compile_launch
    from moec.kernels.launch import Sizes, decode_moe

    launches = decode_moe(Sizes(5120, 8192, 16), tokens, overlap=architecture >= 90)
    assert [each.name for each in launches] == ["route", "gate_up", "encode", "down"]
    for launch in launches:
        built = compile_launch(launch, architecture)
        assert built.cubin.startswith(b"\x7fELF") and built.name == launch.name
        assert [name for name, _ in built.arguments] == list(launch.arguments)
        assert built.block == 32 * launch.warps and built.shared < 227 * 1024


@pytest.mark.parametrize(
    ("sizes", "tokens", "named"),
    [((80, 128, 4), 1, "dim"), ((256, 80, 4), 1, "hidden"), ((256, 256, 4), 65, "tokens"),
     ((256, 256, 4), 0, "tokens")],
)  # fmt: skip
def test_sizes_that_the_tiles_do_not_divide_are_refused(
    sizes: tuple[int, int, int], tokens: int, named: str
) -> None:
    from moec.kernels.launch import Sizes, decode_moe

    with pytest.raises(MoecError, match=f"decode_moe: {named}"):
        decode_moe(Sizes(*sizes), tokens)
