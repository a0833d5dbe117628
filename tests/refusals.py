"""What a refusal looks like: one message in four lines, whoever shows it."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moec.spec.errors import MoecError
from tests.trees import tree


def refusal(call: Callable[[], object], names: str, code: int = 2) -> MoecError:
    """The one clear message that `call` is refused with; it must name `names`."""
    with pytest.raises(MoecError) as caught:
        call()
    error = caught.value
    assert error.exit_code == code, error
    assert all(part.strip() for part in (error.where, error.found, error.expected, error.next_step))
    assert len(str(error).splitlines()) == 4, "where, found, expected, next: a line each"
    assert str(error).replace("\n", "").isprintable(), "no control characters from the input"
    assert names in str(error), f"{names!r} should be named in:\n{error}"
    return error


def refused_and_nothing_left(
    world: Path, call: Callable[[], object], names: str, code: int = 2
) -> None:
    """`call` is refused, and everything below `world` is as it was."""
    before = tree(world)
    refusal(call, names, code)
    assert tree(world) == before, "the disk is as it was"


def one_message(err: str, names: str) -> None:
    """Where, found, expected, next, once each, without a stack trace."""
    assert "Traceback" not in err
    for label in ("error: ", "  found:    ", "  expected: ", "  next:     "):
        assert err.count(label) == 1, err
    assert err.startswith("error: ")
    assert names in "".join(err.split("\n")), err


@contextlib.contextmanager
def within_a_gigabyte() -> Iterator[None]:
    """What runs inside adds less than 1 GiB to the memory of this process at any moment."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = _resident("VmRSS")
    yield
    added = _resident("VmHWM") - before
    assert added < 1 << 30, f"{added >> 20} MiB"


def _resident(field: str) -> int:
    rows = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(row.split()[1]) for row in rows if row.startswith(f"{field}:"))
