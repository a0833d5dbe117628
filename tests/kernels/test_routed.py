"""The MoE kernels of every routing without a GPU: interpreted, and the layers that they refuse."""

from dataclasses import replace
from typing import Any

import pytest

from moec.spec.errors import MoecError
from moec.spec.parts.routing import Routing
from tests.kernels.processes import interpreted

pytest.importorskip("triton", reason="kernels need triton")


@pytest.mark.full
def test_the_kernels_of_every_routing_are_the_eager_op() -> None:
    done = interpreted("interpret_routed.py")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) == 8
    for name, tokens, logits, error in rows:
        assert float(logits) < 1e-5, (name, tokens)
        assert float(error) < 2e-2, (name, tokens)  # as in step_cases.limit


@pytest.mark.parametrize(
    ("changed", "tokens", "named"),
    [({"dim": 80}, 1, "dim"), ({"hidden": 192}, 1, "hidden"), ({"block": 64}, 1, "block"),
     ({}, 65, "tokens"), ({}, 0, "tokens"), ({"experts": 257}, 1, "experts"),
     ({"routing": Routing()}, 1, "weighed")],
)  # fmt: skip
def test_layers_of_any_routing_that_the_kernels_do_not_take_are_refused(
    changed: dict[str, Any], tokens: int, named: str
) -> None:
    from moec.kernels.launches.routed import routed_moe
    from moec.kernels.sizes import RoutedSizes

    layer = RoutedSizes(256, 128, 8, 2, 0, Routing(score="softmax", weighed="output"), 128)
    with pytest.raises(MoecError, match=f"routed_moe: {named}"):
        routed_moe(replace(layer, **changed), tokens)


@pytest.mark.parametrize(
    ("changed", "architecture", "takes"),
    [({}, 90, True), ({"hidden": 1536}, 90, True), ({}, 89, False), ({}, 120, False),
     ({"block": 128}, 90, False), ({"hidden": 1664}, 90, False), ({"hidden": 192}, 90, False),
     ({"dim": 320}, 90, False), ({"shared": 1}, 90, False),
     ({"routing": Routing(score="softmax", choice="logits", groups=8, kept_groups=4,
                          weighed="output")}, 90, False)],
)  # fmt: skip
def test_tensor_cores_take_one_token_of_layers_that_fit(
    changed: dict[str, Any], architecture: int, takes: bool
) -> None:
    from moec.kernels.ahead_of_time.compile import compile_launch
    from moec.kernels.hopper import routed_one
    from moec.kernels.launches.routed import routed_moe
    from moec.kernels.sizes import RoutedSizes

    biased = Routing(choice="scores", bias=True, weighed="output")
    layer = RoutedSizes(256, 128, 64, 8, 0, biased)
    launches, written = routed_moe(replace(layer, **changed), 1, architecture)
    *_, gate_up, down = launches
    assert (gate_up.kernel is routed_one.gate_up) == (down.kernel is routed_one.down) == takes
    assert {name for each in launches for name in each.arguments} >= set(written)
    if takes:  # the layers of `test_compile` have no choice apart
        assert all(compile_launch(each, 90).overlap for each in launches)


@pytest.mark.parametrize(
    ("tokens", "names"),
    [(1, ["score", "gate_up", "down"]),
     (16, ["score", "choose_and_arrange", "gate_up", "encode", "down", "combine"]),
     (17, ["score", "choose", "arrange", "gate_up", "encode", "down", "combine"])],
)  # fmt: skip
def test_few_tokens_take_few_launches(tokens: int, names: list[str]) -> None:
    from moec.kernels.launches.routed import routed_moe
    from moec.kernels.sizes import RoutedSizes

    layer = RoutedSizes(256, 128, 64, 8, 0, Routing(score="softmax", weighed="output"))
    for architecture in (0, 90):
        assert [each.name for each in routed_moe(layer, tokens, architecture)[0]] == names
