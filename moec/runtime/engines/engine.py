"""What an engine is: how it runs the graphs of an artefact, as one record.

Each engine's file ends with its record, `ENGINE`. A target names the engines that run its artefacts
(`moec.artefact.targets`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from moec.artefact.artefact import Artefact
from moec.artefact.manifest import NAME
from moec.runtime.batching import PREFILL_CHUNK
from moec.spec.errors import refuse

#: One call of a graph: inputs by name to outputs by name.
Run = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
#: How caches lie in memory.
#: "slots": [batch, slots, kv_heads * head_dim], each call returns new ones.
#: "buffers": [batch, kv_heads, slots, head_dim], each call writes into them.
Layout = Literal["slots", "buffers"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What the calls of an engine look like.

    Attributes:
        layout: of the caches.
        prefill_chunk: tokens of a prompt that one call takes at most.
        context: positions of a cache, for an engine that was compiled for them; None: any number.
        batch: rows of a decode step at most; None: any number.
    """

    layout: Layout = "slots"
    prefill_chunk: int = PREFILL_CHUNK
    context: int | None = None
    batch: int | None = None


@dataclass(frozen=True, slots=True)
class Engine:
    """How an engine runs artefacts.

    Attributes:
        name: what users call it.
        title: what a report calls it.
        open: (artefact, part, device, name of the session options, taps) -> one part, "model" or
            "vision", ready to run; taps name the inner values that it returns too.
        check: refuses a device on which it cannot run the artefact (exit code 3), or that does not
            exist (2).
        limits: (artefact, device) -> what its calls look like.
        compute: what it computes in, where that is not what the artefact says.
        note: what a report says of running the artefact so, where that needs saying.
        queues: whether a decode step on a GPU returns before the GPU is done.
    """

    name: str
    title: str
    open: Callable[[Artefact, str, str, str, Sequence[str]], Run]
    check: Callable[[Artefact, str], None]
    limits: Callable[[Artefact, str], Limits]
    compute: str | None = None
    note: Callable[[Artefact], str] | None = None
    queues: bool = False

    def computes(self, artefact: Artefact) -> str:
        """What it computes `artefact` in: "fp32", "fp16" or "bf16"."""
        return self.compute or artefact.manifest.compute


def compiled_limits(artefact: Artefact, batch: bool) -> Limits:
    """The limits of graphs that were built for the sizes in the manifest's options.

    Raises:
        MoecError: the manifest has none.
    """
    options = artefact.manifest.options
    if options is None:
        refuse(
            f"{artefact.path / NAME}: options",
            "null",
            "the sizes that an engine is built for",
            "build the artefact again",
        )
    rows = options.batch if batch else None
    return Limits("buffers", options.piece, options.context, rows)
