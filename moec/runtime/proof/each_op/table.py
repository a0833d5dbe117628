"""Turn the distances of values into checks: one for each layer, and one for each op that is off."""

import re
from collections.abc import Iterable, Iterator

from moec.runtime.proof.each_op.distance import Distance
from moec.runtime.proof.report import Check
from moec.spec import names


def checks_of(
    distances: Iterable[Distance], most: float, part: str = "", prefix: str = ""
) -> Iterator[Check]:
    """The checks of the values, in the order of the graph. `most` is the ceiling of all limits.

    A layer whose values are all right is one check; it has the figures of its worst value. Each
    value that is off is a check of its own, which has the value's name: "layers.3: attn.q.rope".
    The values before and after the layers are two more checks, which `part` names. `prefix` stands
    before every name.
    """
    groups: dict[str, list[Distance]] = {}
    for each in distances:
        groups.setdefault(_group(each.name, part, groups), []).append(each)
    for group, values in groups.items():
        layer = f"{prefix}{group}: " if "layers." in group else prefix
        checks = [_check(each, most, layer) for each in values]
        off = [check for check in checks if not check.passed]
        if off:
            yield from off
            continue
        at = max(range(len(values)), key=lambda i: values[i].ratio)
        detail = f"{len(values)} values; nearest to its limit: {_op(values[at].name)}"
        found, limit = checks[at].found, checks[at].limit
        yield Check(f"{prefix}{group}, each op", "error", found, limit, detail)


def _check(value: Distance, most: float, layer: str) -> Check:
    limit = min(value.limit, most)
    return Check(f"{layer}{_op(value.name)}", "error", value.error, limit, value.detail)


def _group(name: str, part: str, groups: Iterable[str]) -> str:
    found = re.match(r"(vision\.layers|layers|present)\.(\d+)\.", name)
    if found:
        place = found[1] if found[1] != "present" else "layers"
        return f"{place}.{found[2]}"
    where = "after" if any("layers." in each for each in groups) else "before"
    return f"{part}{where} the layers"


def _op(name: str) -> str:
    """A value's name within its layer; a cache that a layer writes is "present.3.key"."""
    index = names.layer_of(name)
    if index is not None:
        return name.removeprefix(f"{names.layer(index)}.")
    return re.sub(r"^vision\.layers\.\d+\.", "", name)
