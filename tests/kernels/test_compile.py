"""Every kernel, compiled for GPUs that are not here, and what a launcher must know of each."""

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="kernels need triton")

import moec.kernels
from moec.kernels.ahead_of_time.compile import Compiled, build, compile_launch
from moec.kernels.launches import collectives, heads
from moec.kernels.launches.attend_many import attend_many
from moec.kernels.launches.decode import Tiles, decode_moe
from moec.kernels.launches.descriptors import block_shapes
from moec.kernels.launches.few_tokens import few_linear, few_moe
from moec.kernels.launches.launch import SHARED, Launch
from moec.kernels.launches.many_linear import NARROW, many_linear
from moec.kernels.launches.prefill import prefill_moe, tiles_for
from moec.kernels.launches.routed import routed_moe
from moec.kernels.launches.routed_prefill import routed_prefill_moe
from moec.kernels.launches.step import (
    Heads,
    attend,
    encode,
    linear,
    rope_append,
    rope_table,
    skip_norm,
    swiglu,
    temperature,
)
from moec.kernels.sizes import MOST_TOKENS, RoutedSizes, Sizes
from moec.spec.errors import MoecError
from moec.spec.parts.routing import Routing
from moec.spec.sharding import OWNED_ROWS, Rank

SCOUT, HEADS, SLOTS = Sizes(5120, 8192, 16), Heads(40, 8, 128), 8192
QKV = (HEADS.heads + 2 * HEADS.kv_heads) * HEADS.size
#: Qwen3-30B-A3B's layer, and DeepSeek-V3's
ROUTED = (
    RoutedSizes(2048, 768, 128, 8, 0, Routing(score="softmax", choice="scores", normalise=True,
                weighed="output")),
    RoutedSizes(7168, 2048, 256, 8, 1, Routing(choice="scores", bias=True, groups=8, kept_groups=4,
                normalise=True, factor=2.5, weighed="output"), 128),
)  # fmt: skip
#: a parameter's type -> how PTX declares it
DECLARED = {
    "i1": ".u8", "i32": ".u32", "i64": ".u64", "map": ".align 64 .b8",
    **dict.fromkeys(
        ("*bf16", "*fp32", "*fp8e4nv", "*i1", "*i32", "*i64"), ".u64 .ptr .global .align 1"
    ),
}  # fmt: skip


def launches(architecture: int, tokens: int) -> Iterator[Launch]:
    """Those of a step of Scout with so many rows; of prefill, with more than a step has."""
    overlap, dim = architecture >= 90, SCOUT.dim
    if tokens > MOST_TOKENS:
        yield from prefill_moe(SCOUT, tokens, tiles_for(architecture, 132))
        for layer in ROUTED:
            yield from routed_prefill_moe(layer, tokens, tiles_for(architecture, 132))[0]
        yield rope_append(HEADS, tokens, True, 1e-5, False, overlap)
        yield rope_append(HEADS, tokens, False, None, True, overlap)
        yield attend_many(HEADS, 2, tokens, architecture)
        for width, inputs in ((QKV, dim), (192, 64)):
            yield many_linear(width, inputs, tokens, architecture)
    else:
        yield from decode_moe(SCOUT, tokens, overlap=overlap, eps=1e-5)
        yield decode_moe(SCOUT, tokens, overlap=overlap)[0]
        yield skip_norm(dim, tokens, 1e-5, True, True, overlap, parts=4)
        yield from few_moe(SCOUT, tokens, architecture, eps=1e-5)[0]
        for width, inputs in ((QKV, dim), (dim, HEADS.heads * HEADS.size), (dim, 16384)):
            yield linear(width, inputs, tokens, overlap, SHARED[architecture])
            yield few_linear(width, inputs, tokens, architecture)
        for layer in ROUTED:
            yield from routed_moe(layer, tokens, architecture)[0]
        yield from attend(HEADS, tokens, SLOTS, True, 1e-5, False, overlap)[0]
        yield from attend(HEADS, tokens, SLOTS, False, None, True, overlap)[0]
        yield from heads.attend_slots(HEADS, tokens, SLOTS, 0.1)[0]
    for add, narrow in ((False, True), (True, True), (True, False)):
        yield skip_norm(dim, tokens, 1e-5, add, narrow, overlap)
    yield rope_table(HEADS.size, tokens)
    for either in (True, False):
        yield heads.rope(HEADS.size, HEADS.heads, tokens, either)
        yield heads.head_norm(HEADS.size, tokens * HEADS.heads, 1e-6, either)
    yield temperature(8192, 0.1, tokens)
    yield encode(dim, tokens, overlap)
    yield swiglu(2 * SCOUT.hidden, tokens, overlap)


@pytest.mark.full
@pytest.mark.parametrize("architecture", SHARED)
@pytest.mark.parametrize("tokens", [1, pytest.param(16, marks=pytest.mark.slow), 64, 4096])
def test_every_kernel_compiles_ahead_of_time(architecture: int, tokens: int) -> None:
    for launch in launches(architecture, tokens):
        found = compile_launch(launch, architecture)
        assert found.cubin.startswith(b"\x7fELF") and found.name == launch.name
        assert found.grid == launch.grid
        assert found.overlap == ("launch_pdl" in launch.options)
        check_entry(found, build(launch, architecture).asm["ptx"])
        described = list(block_shapes(launch)) if architecture >= 90 else []
        assert sorted(each.name for each in found.maps) == sorted(described)
        for each in found.maps:
            assert (each.element, each.bytes) in ((0, 1), (9, 2))
            assert 16 << each.swizzle == min(128, each.columns * each.bytes)
            assert max(each.rows, each.columns) <= 256


@pytest.mark.full
@pytest.mark.parametrize("architecture", SHARED)
@pytest.mark.parametrize("tokens", [1, 64, 4096])
def test_experts_of_maverick_compile_too(architecture: int, tokens: int) -> None:
    maverick = replace(SCOUT, experts=128)
    found = (
        prefill_moe(maverick, tokens, tiles_for(architecture, 132))
        if tokens > MOST_TOKENS
        else few_moe(maverick, tokens, architecture)[0]
    )
    for launch in found:
        compile_launch(launch, architecture)


@pytest.mark.full
@pytest.mark.parametrize("architecture", SHARED)
def test_many_tokens_of_other_models_compile_too(architecture: int) -> None:
    for size in (16, 32, 64, 256):
        compile_launch(attend_many(Heads(4, 1, size), 1, 100, architecture), architecture)
    if architecture == 90:
        compile_launch(many_linear(QKV, SCOUT.dim, 1024, 90, cut=NARROW), 90)


@pytest.mark.full
@pytest.mark.parametrize("rank", [Rank(1, 2), Rank(2, 4)])
def test_kernels_between_gpus_compile(rank: Rank) -> None:
    what = collectives.Sum(add=True, norm=True, narrow=True, eps=1e-5)
    for rows, parts in ((1, 4), (OWNED_ROWS, 1)):
        found = compile_launch(
            collectives.all_reduce(5120, rows, replace(what, parts=parts), rank, True), 90
        )
        assert found.overlap
    for whole, narrow in ((True, True), (False, False)):
        for launch in collectives.prefill_sum(5120, 300, replace(what, narrow=narrow), rank, whole):
            compile_launch(launch, 90)
    for launch in collectives.likeliest(3, 2000, 2000, rank):
        compile_launch(launch, 90)
    compile_launch(collectives.embedding_part(2000, 5120, 3), 90)


def check_entry(found: Compiled, ptx: str) -> None:
    """The parameters are those that the code declares, and two that are null."""
    entry = ptx[ptx.index(".entry") :].partition("{")[0]
    declared = re.findall(r"\.param (.*) \w+_param_\d+(?:\[128\])?,?\n", entry)
    kinds = [each.type for each in found.parameters]
    assert declared == [DECLARED[kind] for kind in [*kinds, "*i32", "*i32"]]
    assert f".reqntid {found.block}\n" in entry


@pytest.mark.full
def test_tiles_that_do_not_fit_are_refused() -> None:
    tiles = Tiles(gate_up_depth=512, gate_up_stages=5)
    launch = decode_moe(SCOUT, 1, tiles)[1]
    with pytest.raises(MoecError, match="shared memory"):
        compile_launch(launch, 89)


def test_nothing_that_is_compiled_needs_torch() -> None:
    """A plugin is built where there is none."""
    folder = Path(moec.kernels.__file__).parent
    paths = [path.relative_to(folder).with_suffix("") for path in folder.rglob("[!_]*.py")]
    names = [".".join(path.parts) for path in paths if path.parts[0] != "torch"]
    expected = {"ahead_of_time.compile", "launches.step", "hopper.moe_prefill", "hopper.pipeline"}
    assert expected <= set(names)
    code = "import sys; sys.modules['torch'] = None\n"
    code += "".join(f"import moec.kernels.{name}\n" for name in names)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(moec.__file__).parents[1])
