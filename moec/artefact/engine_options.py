"""What an engine is built for: sizes, GPUs, and where its weights are."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from moec.spec.errors import refuse
from moec.spec.frozen import Frozen
from moec.spec.model import ModelSpec
from moec.spec.names import GLOBAL, RING, slots

#: what TensorRT-RTX calls the compute capabilities that it compiles FP8 and bf16 for
ARCHITECTURES = ("SM89", "SM120")


#: a field -> what the command line calls it, where that is another name
_OPTIONS = {"architectures": "--sm", "piece": "--prefill-chunk"}


class EngineOptions(Frozen):
    """Sizes that an engine is compiled for, and how.

    An engine's caches have `context` slots in each row, less in chunked layers. A call takes up to
    `batch` rows of one token each, or a prefill chunk of up to `piece` tokens of one prompt; the
    vision tower takes up to `tiles` image tiles.
    """

    context: int = Field(
        default=8192, ge=1, le=1 << 24, description="tokens of a row, prompt included"
    )
    batch: int = Field(default=8, ge=1, le=1 << 12, description="rows at most")
    piece: int = Field(
        default=512,
        ge=1,
        le=1 << 16,
        description="prefill chunk: tokens of a prompt in one call at most",
    )
    tiles: int = Field(default=8, ge=1, le=1 << 10, description="image tiles in one call at most")
    architectures: tuple[Annotated[str, Field(pattern=r"^SM\d+$")], ...] = Field(
        default=(), description="compute capabilities, of target tensorrt-rtx; (): the usual"
    )
    bindings: Literal["experts", "all", "none"] = Field(
        default="experts", description="weights that are inputs of the engine, not inside it"
    )
    build: bool = Field(default=True, description="whether to build engines, or the ONNX alone")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.piece > self.context:
            raise ValueError(f"prefill chunk {self.piece} is above context {self.context}")
        if len(set(self.architectures)) < len(self.architectures):
            raise ValueError(f"architectures {', '.join(self.architectures)}: one is there twice")
        return self

    def slots(self, spec: ModelSpec) -> dict[str, int]:
        """Slots of the caches by the names that the decoder has for them."""
        chunk = spec.text.chunk or self.context
        return {slots(GLOBAL): self.context, slots(RING): min(chunk, self.context)}


def engine_options(chosen: Mapping[str, Any]) -> EngineOptions:
    """Options of which some were chosen by a user.

    Raises:
        MoecError: names the first that cannot be.
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
