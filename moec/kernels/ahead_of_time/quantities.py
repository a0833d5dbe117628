"""Numbers of a launch that depend on the sizes of a call, as formulas over integers."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

#: the variables of all programs, by their indices; the launcher finds the last two from the others:
#: tokens / batch, and batch * slots
VARIABLES = ("tokens", "batch", "slots", "steps", "places")
#: numbers of tokens after which a quantity's steps repeat: 16 share a program, 128 share a tile
PERIODS = (1, 16, 128)


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number that depends on the variable `of`, which is an index into a program's variables.

    It is add + the sum of mul * ((variable + shift) // period) over the terms (mul, shift). A
    program holds it as of, add, period, and n of (mul, shift).
    """

    add: int
    period: int = 1
    terms: tuple[tuple[int, int], ...] = ()
    of: int = 0

    def at(self, value: int) -> int:
        """Its value where the variable has this `value`."""
        return self.add + sum(mul * ((value + shift) // self.period) for mul, shift in self.terms)

    def integers(self) -> list[int]:
        """The integers that stand for it in a program."""
        return [self.of, self.add, self.period, len(self.terms), *chain(*self.terms)]


def multiple(variable: str, of: int = 1) -> Quantity:
    """`of` times a variable."""
    return Quantity(0, 1, ((of, 0),), VARIABLES.index(variable))


def blocks(variable: str, size: int) -> Quantity:
    """How many blocks of `size` cover a variable."""
    return Quantity(0, size, ((1, size - 1),), VARIABLES.index(variable))


def longest(first: int, rows: Sequence[Sequence[int]], of: int = 0) -> tuple[int, list[Quantity]]:
    """How many of `rows` quantities of the variable `of` can describe, and these quantities.

    Row i has the numbers for the value first + i.
    """
    count = len(rows)
    if not _fit_all(first, rows, of):
        count = bisect_left(
            range(1, count), True, key=lambda few: _fit_all(first, rows[:few], of) is None
        )
    found = _fit_all(first, rows[:count], of)
    assert found is not None
    return count, found


def _fit_all(first: int, rows: Sequence[Sequence[int]], of: int) -> list[Quantity] | None:
    found = []
    for column in zip(*rows, strict=True):
        each = fit(first, column, of)
        if each is None:
            return None
        found.append(each)
    return found


def fit(first: int, values: Sequence[int], of: int = 0) -> Quantity | None:
    """The quantity with exactly these values from `first` on; None if there is none."""
    for period in PERIODS:
        steps: dict[int, int] = {}  # by the remainder of the variable
        for value, (before, after) in enumerate(pairwise(values), first + 1):
            steps.setdefault(value % period, after - before)
        terms = tuple((step, -at % period) for at, step in steps.items() if step)
        start = Quantity(0, period, terms).at(first)
        found = Quantity(values[0] - start, period, terms, of)
        if all(found.at(value) == each for value, each in enumerate(values, first)):
            return found
    return None
