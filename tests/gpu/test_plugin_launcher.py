"""The plugin's launcher on a GPU: the same numbers as torch has, from cubins and without Python."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moec.graph_builder import ops
from moec.kernels.launches.launch import SHARED
from moec.kernels.sizes import MOST_TOKENS, Sizes

SIZES, MOST = Sizes(dim=512, hidden=1024, experts=16), 1000
NAMES = ("router", "gate_up", "gate_up_scale", "down", "down_scale")


class Layer:
    """The launcher on torch's tensors and its stream."""

    def __init__(self, folder: Path, architecture: int) -> None:
        from benchmarks.moe_kernels import random_weights
        from moec.kernels.ahead_of_time.operations import moe_layer
        from moec.kernels.ahead_of_time.program import build_program
        from tests.kernels.launcher.launcher import Launcher, compile_library

        torch.manual_seed(1)
        self.weights = random_weights(SIZES)
        program = build_program(moe_layer(SIZES, MOST), (architecture,))
        self.launcher = Launcher(compile_library(folder / "liblauncher.so"), program)
        self.room = self.launcher.workspace(2 * MOST)
        # 16 bytes off: no more than that may be counted on.
        self.workspace = torch.empty(self.room + 16, dtype=torch.uint8, device="cuda")[16:]
        torch.cuda.current_stream().synchronize()
        self.launcher.prepare()

    def __call__(self, x: Tensor) -> Tensor:
        out = torch.full_like(x, float("nan"))
        self.workspace.fill_(0xFF)  # what was there before must not matter
        self.start(x, out)
        return out

    def start(self, x: Tensor, out: Tensor) -> None:
        given = [x, *(self.weights[name] for name in NAMES), out]
        self.launcher.run(
            len(x), [each.data_ptr() for each in given], self.workspace.data_ptr(), self.room,
            torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Layer:
    major, minor = torch.cuda.get_device_capability()
    if 10 * major + minor not in SHARED:
        pytest.skip(f"no kernels for compute capability {major}.{minor}")
    if not shutil.which("g++"):
        pytest.skip("needs a C++ compiler")
    return Layer(tmp_path_factory.mktemp("launcher"), 10 * major + minor)


def random_input(tokens: int) -> Tensor:
    return torch.randn(tokens, SIZES.dim, device="cuda").bfloat16()


@pytest.mark.parametrize("tokens", [1, 2, 7, 16, 33, 64, 65, 200, MOST, MOST + 33, 2 * MOST])
def test_it_is_the_layer(layer: Layer, tokens: int) -> None:
    from benchmarks.moe_kernels import error
    from moec.kernels.torch.moe import DecodeMoe
    from moec.kernels.torch.prefill import PrefillMoe

    x = random_input(tokens)
    found = layer(x)
    expected = ops.moe_layer.eager(x, *(layer.weights[name] for name in NAMES))
    assert error(found, expected) <= (2e-2 if tokens <= 3 else 1.5e-2)
    parts = []
    for part in x.split(MOST):
        if len(part) <= MOST_TOKENS:
            parts.append(DecodeMoe(SIZES, layer.weights)(part))
        else:
            parts.append(PrefillMoe(SIZES, layer.weights)(part))
    assert torch.equal(found, torch.cat(parts))


@pytest.mark.parametrize("tokens", [1, 64, 200])
def test_it_repeats_one_after_the_other(layer: Layer, tokens: int) -> None:
    """Layer after layer in one workspace, each on what the one before gave."""
    x = random_input(tokens)
    expected = [layer(x)]
    for _ in range(3):
        expected.append(layer(expected[-1]))
    found = [torch.empty_like(x) for _ in expected]
    for start, out in zip([x, *found], found, strict=False):
        layer.start(start, out)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("tokens", [1, 33, 200])
def test_it_runs_in_a_cuda_graph(layer: Layer, tokens: int) -> None:
    x, out = random_input(tokens), random_input(tokens)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer.start(x, out)
    for _ in range(2):
        x.copy_(random_input(tokens))
        graph.replay()
        assert torch.equal(out, layer(x))


def test_refusals(layer: Layer) -> None:
    from tests.kernels.launcher.launcher import LaunchError

    x, room = random_input(200), layer.room
    layer.room = 16
    try:
        with pytest.raises(LaunchError, match="workspace"):
            layer.start(x, torch.empty_like(x))
    finally:
        layer.room = room
    with pytest.raises(LaunchError, match="aligned to 16"):
        layer.start(x.flatten()[1:-511].view(199, 512), torch.empty_like(x))
