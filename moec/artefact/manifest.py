"""What an artefact says of itself: `manifest.json`, as frozen data."""

from typing import Any, Literal

from pydantic import Field

from moec.artefact.engine_job import Built
from moec.artefact.engine_options import EngineOptions
from moec.artefact.targets import find_target
from moec.spec.frozen import Frozen
from moec.spec.model import ModelSpec
from moec.spec.names import is_past
from moec.weights.packing import Packing

FORMAT = "moec/1"
NAME = "manifest.json"

WeightMode = Literal["unbound", "in-place", "link", "copy", "pack"]


class File(Frozen):
    """A file of the artefact that the build wrote."""

    size: int
    sha256: str


class ShardRef(Frozen):
    """A weight file: its size, and the hash of its header instead of its gigabytes."""

    size: int
    header_sha256: str


class TensorRef(Frozen):
    """Where a parameter's bytes lie: `length` bytes at `offset` of a shard."""

    file: str
    offset: int
    length: int


class Weights(Frozen):
    """The weights of an artefact.

    `folder` is where shard names start from: absolute for weights in place, None for weights beside
    the model. Unbound artefacts have no shards and no tensors.
    """

    mode: WeightMode
    folder: str | None = None
    shards: dict[str, ShardRef] = Field(default_factory=dict)
    tensors: dict[str, TensorRef] = Field(default_factory=dict)


class Port(Frozen):
    """An input or output of the graph; symbolic sizes are names."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class Ports(Frozen):
    """What a graph takes and gives."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


class SessionOptions(Frozen):
    """ONNX Runtime session options: `entries` by key, the rest by attribute of SessionOptions."""

    entries: dict[str, str] = Field(default_factory=dict)
    execution_order: Literal["DEFAULT", "PRIORITY_BASED"] = "DEFAULT"
    enable_mem_pattern: bool = True


class Engine(Frozen):
    """An engine file: where it is, how it was built, and whether it ever ran.

    `bindings` are weights that it takes as inputs, `plugins` libraries that it wants loaded.
    `files` are its own: those of the manifest do without, so that an engine can be built again.
    """

    file: str
    built: Built
    bindings: tuple[str, ...] = ()
    plugins: tuple[str, ...] = ()
    files: dict[str, File] = Field(default_factory=dict)


class Build(Frozen):
    """How the build went: seconds per stage, peak resident bytes of the process, bytes on disk.

    `bytes_written` counts all of them, `bytes_copied` weights as they were, `bytes_packed` weights
    that were rewritten, from `bytes_read` of them.
    """

    seconds: dict[str, float]
    peak_bytes: int
    bytes_written: int
    bytes_copied: int
    bytes_packed: int = 0
    bytes_read: int = 0


class Manifest(Frozen):
    """The whole of `manifest.json`.

    `inputs` and `outputs` are the decoder's, `vision` those of the vision tower where there is one.
    `packings` says how each stored weight is made, by the name of its first tensor; it is empty
    where all weights are the checkpoint's own bytes. `presets` are sets of session options for
    ONNX Runtime, by name. `opset` is ONNX's. `engines` are the TensorRT engines by part, built for
    the sizes in `options`; none of them ran when it was built. `parity` is the report of the last
    validation, and the only statement about the numbers.
    """

    format: Literal["moec/1"] = "moec/1"
    spec: ModelSpec
    target: str
    dialect: str
    opset: int | None = None
    precision: str
    checkpoint: str | None
    weights: Weights
    files: dict[str, File]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    vision: Ports | None = None
    packings: dict[str, Packing] = Field(default_factory=dict)
    presets: dict[str, SessionOptions] = Field(default_factory=dict)
    options: EngineOptions | None = None
    engines: dict[str, Engine] = Field(default_factory=dict)
    versions: dict[str, str]
    build: Build
    parity: dict[str, Any] | None = None

    @property
    def engine(self) -> str:
        """The engine that runs it where nobody chooses another."""
        return find_target(self.target).engine

    @property
    def compute(self) -> str:
        """What the graph computes in: "fp32", "fp16" or "bf16"."""
        return find_target(self.target).compute(self.precision)

    def ports(self, part: str = "model") -> Ports:
        """What a part takes and gives."""
        if part == "vision" and self.vision:
            return self.vision
        return Ports(inputs=self.inputs, outputs=self.outputs)

    @property
    def buffered(self) -> bool:
        """Whether caches are buffers [batch, kv_heads, slots, head_dim] that a call writes into."""
        return any(len(port.shape) == 4 for port in self.inputs if is_past(port.name))

    @property
    def rewritten(self) -> dict[str, Packing]:
        """Parameters whose bytes are not the checkpoint's own."""
        return {
            packing.source: packing
            for packing in self.packings.values()
            if packing.names(self.spec.dtype) != (packing.source,)
        }
