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
