"""What ranks compute together is what one process computes: the same sums, in another order.

Without rounding to FP8, which `exact` leaves out, nothing else differs.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from moec.artefact.artefact import open_artefact
from moec.graph_builder import ops
from moec.spec.sharding import ALONE
from tests.ranks import torchrun
from tests.runtime.ranks.exact import DRAWN, exact, results, unrounded

pytestmark = pytest.mark.full

Found = dict[str, Tensor]
#: (ranks, model); the second has too few key/value heads for four ranks, the third for equal parts
CASES = [
    (2, "tiny-scout"),
    (2, "maverick"),
    (2, "uneven"),
    (4, "tiny-scout"),
    (4, "maverick"),
]


@pytest.fixture(scope="module")
def alone(shared: dict[str, Path]) -> dict[str, Found]:
    """What one process finds, by model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops.encode, "eager", unrounded)
        return {name: results(exact(open_artefact(path), ALONE)) for name, path in shared.items()}


@pytest.fixture(scope="module")
def together(
    shared: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[int, str], list[Found]]:
    """What each rank finds, by number of ranks and model."""
    folder = tmp_path_factory.mktemp("found")
    found: dict[tuple[int, str], list[Found]] = {}
    for count in (2, 4):
        models = [name for ranks, name in CASES if ranks == count]
        paths = [shared[name] for name in models]
        ran = torchrun(count, "-m", "tests.runtime.ranks.exact", folder, *paths)
        assert ran.returncode == 0, ran.stderr
        ranks = [torch.load(folder / f"{count}.{index}.pt") for index in range(count)]
        found |= {(count, name): [each[name] for each in ranks] for name in models}
    return found


def apart(found: Tensor, expected: Tensor) -> float:
    """The largest error, relative to the largest value."""
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    return float((found - expected).abs().max() / expected.abs().max())


def test_ranks_compute_what_one_process_computes_all_of_them_the_same(
    alone: dict[str, Found], together: dict[tuple[int, str], list[Found]]
) -> None:
    """One test for all cases: workers of pytest would each start the ranks again."""
    for (count, model), (found, *others) in together.items():
        expected = alone[model]
        assert found.keys() == {*expected, DRAWN} and len(others) == count - 1
        for name, value in expected.items():
            if value.is_floating_point():
                assert apart(found[name], value) < 1e-5, (count, model, name)
            else:
                assert torch.equal(found[name], value), (count, model, name)
        for name, value in found.items():
            for other in others:
                assert torch.equal(other[name], value), (count, model, name, "to the bit")


def test_values_that_are_compared_say_something(alone: dict[str, Found]) -> None:
    for found in alone.values():
        choices = [value for name, value in found.items() if name.endswith("route.1")]
        assert all(len(value.unique()) > 1 for value in choices), "tokens choose several experts"
        assert all(value.std() > 0.1 for name, value in found.items() if name == "logits")
        past = [value for name, value in found.items() if name.startswith("past")]
        assert all(value.abs().amax((0, 2, 3)).min() > 0 for value in past), "in every head"
