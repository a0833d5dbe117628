"""What a user chooses for a TensorRT engine: sizes, GPUs, and which weights are inputs."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from moec.spec.data import Frozen
from moec.spec.errors import refuse
from moec.spec.model import ModelSpec
from moec.spec.names import GLOBAL, RING, slots

#: the compute capabilities that have FP8 and bf16, in TensorRT-RTX's spelling
ARCHITECTURES = ("SM89", "SM120")


#: a field -> its option on the command line, where the names differ
_OPTIONS = {"architectures": "--sm", "piece": "--prefill-chunk"}


class EngineOptions(Frozen):
    """The sizes that a TensorRT engine is compiled for, and how it is built.

    The caches have `context` slots for each sequence; those of chunked layers have fewer. A decode
    step takes one token of each of up to `batch` sequences. A prefill call takes a chunk of up to
    `piece` tokens of one sequence. A call of the vision tower takes up to `tiles` image tiles.
    """

    context: int = Field(
        default=8192, ge=1, le=1 << 24, description="tokens of a sequence at most, with its prompt"
    )
    batch: int = Field(
        default=8, ge=1, le=1 << 12, description="sequences in a decode step at most"
    )
    piece: int = Field(
        default=512, ge=1, le=1 << 16, description="tokens of a prefill chunk at most"
    )
    tiles: int = Field(default=8, ge=1, le=1 << 10, description="image tiles in one call at most")
    architectures: tuple[Annotated[str, Field(pattern=r"^SM\d+$")], ...] = Field(
        default=(), description="GPUs to build for, with target tensorrt-rtx; (): the usual"
    )
    bindings: Literal["experts", "all", "none"] = Field(
        default="experts", description="weights that the engine takes as inputs and does not hold"
    )
    build: bool = Field(
        default=True, description="whether to build engines; if not, only their ONNX is written"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.piece > self.context:
            raise ValueError(f"prefill chunk {self.piece} is above context {self.context}")
        if len(set(self.architectures)) < len(self.architectures):
            raise ValueError(f"architectures {', '.join(self.architectures)}: one is there twice")
        return self

    def slots(self, spec: ModelSpec) -> dict[str, int]:
        """The slots of the caches; the keys are the symbolic sizes of the decoder's graph."""
        chunk = spec.text.chunk or self.context
        return {slots(GLOBAL): self.context, slots(RING): min(chunk, self.context)}


def engine_options(chosen: Mapping[str, Any]) -> EngineOptions:
    """The options that a user chose, by field, with defaults for the others.

    Raises:
        MoecError: a value is not allowed; the message names the first one.
    """
    context = chosen.get("context")
    fitting = {"piece": min(context, 512) if isinstance(context, int) else 512} | dict(chosen)
    try:
        return EngineOptions.model_validate(fitting)
    except ValidationError as error:
        first = error.errors()[0]
        at = str(first["loc"][0]) if first["loc"] else "piece"
        refuse(
            _OPTIONS.get(at, f"--{at}"),
            fitting.get(at),
            first["msg"].removeprefix("Value error, "),
            "choose another",
        )
