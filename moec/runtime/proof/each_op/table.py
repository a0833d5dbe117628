"""Turn the distances of values into checks: one for each layer, and one for each op that is off."""

import re
from collections.abc import Iterable, Iterator

from moec.runtime.proof.each_op.distance import Distance
from moec.runtime.proof.report import Check
from moec.spec import names

#: what a report calls the values that belong to no layer, by their place in the graph
BEFORE, AFTER = "before the layers", "after the layers"


def checks_of(distances: Iterable[Distance], most: float, prefix: str = "") -> Iterator[Check]:
    """The checks of the values, in the order of the graph. `most` is the ceiling of all limits.

    A layer whose values are all right is one check; it has the figures of its worst value. Each
    value that is off is a check of its own, which has the value's name: "layers.3: attn.q.rope".
    """
    groups: dict[str, list[Distance]] = {}
    for each in distances:
        groups.setdefault(_group(each.name, groups), []).append(each)
    for group, values in groups.items():
        checks = [(_check(each, most, f"{prefix}{group}"), each) for each in values]
        off = [check for check, _ in checks if not check.passed]
        if off:
            yield from off
            continue
        check, at = max(checks, key=lambda pair: pair[1].ratio)
        detail = f"{len(values)} values; nearest to its limit: {_op(at.name)}"
        yield Check(f"{prefix}{group}, each op", "error", check.found, check.limit, detail)


def _check(value: Distance, most: float, group: str) -> Check:
    limit = min(value.limit, most)
    return Check(f"{group}: {_op(value.name)}", "error", value.error, limit, value.detail)


def _group(name: str, groups: Iterable[str]) -> str:
    found = re.match(r"(vision\.layers|layers|present)\.(\d+)\.", name)
    if found:
        place = found[1] if found[1] != "present" else "layers"
        return f"{place}.{found[2]}"
    return AFTER if any("layers." in each for each in groups) else BEFORE


def _op(name: str) -> str:
    """A value's name within its layer; a cache that a layer writes is "present.3.key"."""
    index = names.layer_of(name)
    if index is not None:
        return name.removeprefix(f"{names.layer(index)}.")
    return re.sub(r"^vision\.layers\.\d+\.", "", name)
