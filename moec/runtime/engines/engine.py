"""The record that describes an engine: how it runs the graphs of an artefact.

Each engine's file ends with its record, `ENGINE`. A target's record names the engines that run its
artefacts (`moec.artefact.targets`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from moec.artefact.artefact import Artefact
from moec.artefact.manifest import NAME
from moec.runtime.batching import PREFILL_CHUNK
from moec.spec.errors import refuse
from moec.spec.sharding import ALONE, Rank

#: Runs one call of a graph: inputs by name -> outputs by name.
Run = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
#: The layout of caches in memory.
#: "slots": [batch, slots, kv_heads * head_dim]; a call returns the caches, which are new ones or,
#: after a decode step of target torch, the given ones with a token more.
#: "buffers": [batch, kv_heads, slots, head_dim]; each call writes into the given caches.
Layout = Literal["slots", "buffers"]


@dataclass(frozen=True, slots=True)
class Limits:
    """The layout of an engine's caches, and the largest calls that it takes.

    Attributes:
        layout: the layout of the caches.
        prefill_chunk: the most tokens of a prompt in one call.
        context: the number of tokens in a cache that the engine was compiled for; None: any.
        batch: the most sequences in a decode step; None: any number.
        greedy: whether a decode step with the input `greedy` gives the likeliest tokens, `best`,
            in place of logits.
    """

    layout: Layout = "slots"
    prefill_chunk: int = PREFILL_CHUNK
    context: int | None = None
    batch: int | None = None
    greedy: bool = False


@dataclass(frozen=True, slots=True)
class Engine:
    """The record of an engine.

    Attributes:
        name: its name on the command line.
        title: its name in a report.
        open: (artefact, part, device, name of the session options, taps) -> one part, "model" or
            "vision", ready to run; taps are the inner values that a call returns too.
        check: refuses a device on which the engine cannot run the artefact (exit code 3), or that
            does not exist (2).
        limits: (artefact, device) -> the limits of its calls.
        compute: the dtype that it computes in; None: the one in the artefact's manifest.
        note: (artefact) -> a remark for the report of a proof; None: there is none.
        queues: whether a decode step on a GPU returns before the GPU has finished.
        shown: (artefact, part, names) -> those of the names that are values of the part, which
            `open` takes as taps; None: all of them.
        gives: (artefact, part, device, name of the session options, taps, names) -> what `open`
            returns, for calls whose inputs "NAME.given" stand for the inner values `names`; None:
            the engine cannot do that.
        rank: which of the processes that share the model it runs in.
        of_rank: the record of the engine in a rank; None: ranks cannot share its models.
    """

    name: str
    title: str
    open: Callable[[Artefact, str, str, str, Sequence[str]], Run]
    check: Callable[[Artefact, str], None]
    limits: Callable[[Artefact, str], Limits]
    compute: str | None = None
    note: Callable[[Artefact], str] | None = None
    queues: bool = False
    shown: Callable[[Artefact, str, Sequence[str]], list[str]] | None = None
    gives: Callable[[Artefact, str, str, str, Sequence[str], Sequence[str]], Run] | None = None
    rank: Rank = ALONE
    of_rank: "Callable[[Rank], Engine] | None" = None

    def shared(self, rank: Rank) -> "Engine":
        """The record of the engine in `rank`; this one in a process alone.

        Raises:
            MoecError: ranks cannot share models of this engine.
        """
        if rank.count == 1:
            return self
        if self.of_rank is None:
            refuse(
                f"{rank.count} GPUs",
                f"engine {self.name}",
                "engine torch, whose fused programs several GPUs can share",
                "leave gpus out, or moec build --target torch --precision fp8",
            )
        return self.of_rank(rank)

    def computes(self, artefact: Artefact) -> str:
        """The dtype in which it computes `artefact`: "fp32", "fp16" or "bf16"."""
        return self.compute or artefact.manifest.compute


def compiled_limits(artefact: Artefact, batch: bool) -> Limits:
    """The limits of TensorRT engines, which are built for the sizes in the manifest's options.

    `batch` says whether the batch is limited, too.

    Raises:
        MoecError: the manifest has no such options.
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
