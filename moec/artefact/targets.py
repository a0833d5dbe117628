"""The record that describes a target, and the list of all targets.

Each target is a folder of `moec/targets`. Its `__init__.py` holds the record as `TARGET`; the files
beside it hold the code that only this target needs. `targets` finds the folders, so that whoever
adds a target adds a folder and changes no other file.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from moec.spec.errors import refuse


@dataclass(frozen=True, slots=True)
class Precision:
    """What a target does in one precision.

    Attributes:
        stays: the dialect of graphs that read the checkpoint's own bytes; None if the target always
            packs the weights.
        packed: the dialect of graphs that read packed weights; None if the target never packs.
        compute: the dtype that the graph computes in: "fp32", "fp16" or "bf16".
        given: whether it is for checkpoints that are in this precision already, and for no others.
    """

    stays: str | None
    packed: str | None
    compute: str
    given: bool = False


@dataclass(frozen=True, slots=True)
class Target:
    """The record of a target. `moec/targets` has one for each.

    The record refers to code by strings "module:name". The code is imported when it is used, so
    that a machine needs only the packages of the targets that it uses.

    Attributes:
        name: the name on the command line.
        precisions: what the target does in each precision; the first is the default of a build.
        builder: "module:name" of its `moec.exporters.builder.Builder`, whose functions refuse
            models, build the files, and read them again for `bind`.
        engines: each engine that runs its artefacts, by name, as "module:name" of a
            `moec.runtime.engines.engine.Engine`; the first is the default of a session.
        proofs: device -> the name of the engine that a proof runs there; by default the first.
        suffix: the ending of its graphs' file names.
        scheme: the default FP8 scheme for wide weights.
        devices: for a target that builds differently for some devices: device -> the precisions
            that run there, the default first -> the name of the target that builds for it.
        reduced: dialect -> the smallest sizes of the reduced-size model, as arguments of
            `moec.spec.reduced`, for kernels that need larger ones than its defaults.
    """

    name: str
    precisions: Mapping[str, Precision]
    builder: str
    engines: Mapping[str, str]
    proofs: Mapping[str, str] = field(default_factory=dict)
    suffix: str = ".onnx"
    scheme: str = "meta"
    devices: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    reduced: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def engine(self) -> str:
        """The engine that a session opens by default."""
        return next(iter(self.engines))

    def compute(self, precision: str) -> str:
        """The dtype that a graph of `precision` computes in: "fp32", "fp16" or "bf16"."""
        known = self.precisions.get(precision)
        return known.compute if known else precision


@cache
def targets() -> dict[str, Target]:
    """All targets, by name."""
    folders = import_module("moec.targets")
    names = [each.name for each in iter_modules(folders.__path__) if each.ispkg]
    rows: list[Target] = [import_module(f"{folders.__name__}.{name}").TARGET for name in names]
    return {row.name: row for row in rows}


def find_target(
    name: str, where: object | None = None, next_step: str = "use --target onnx"
) -> Target:
    """The record of target `name`.

    Raises:
        MoecError: there is no such target; `where` and `next_step` are parts of the message.
    """
    known = targets()
    if name not in known:
        refuse(
            where or f"--target {name}", f"no such target: {name}", " or ".join(known), next_step
        )
    return known[name]


def imported(place: str) -> Any:
    """Import the object that "module:name" refers to."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)
