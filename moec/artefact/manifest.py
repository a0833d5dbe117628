"""The manifest of an artefact, `manifest.json`, as frozen data that protects itself.

The manifest holds a digest of its own content. Two builds of the same model write the same bytes:
how long a build took is printed, and not stored.
"""

import hashlib
import json
from pathlib import PurePosixPath
from typing import Any, Literal, Self

from pydantic import BaseModel, Field, field_validator, model_validator

from moec.artefact.engine_job import Built
from moec.artefact.engine_options import EngineOptions
from moec.artefact.targets import find_target, targets
from moec.spec.data import Frozen
from moec.spec.model import ModelSpec
from moec.spec.names import INPUT_IDS, LOGITS, is_past
from moec.spec.parameters import parameters
from moec.weights.packing import Packing

FORMAT = "moec/1"
NAME = "manifest.json"

WeightMode = Literal["unbound", "in-place", "link", "copy", "pack"]


class File(Frozen):
    """The size and hash of a file that the build wrote."""

    size: int
    sha256: str


class ShardRef(Frozen):
    """A weight file, by its size and the hash of its header.

    `sha256` is the hash of the whole file. A copy has it, because the build read every byte. Files
    that stay in place or are linked have it if the user asked for it.
    """

    size: int
    header_sha256: str
    sha256: str | None = None


class TensorRef(Frozen):
    """Where the bytes of a stored tensor are: `length` bytes at `offset` of a shard."""

    file: str
    offset: int
    length: int


class TensorHash(Frozen):
    """The SHA-256 of a stored tensor.

    If `pieces` is above 1, the tensor was written in that many pieces of one size, one for each
    expert, and the hash is that of the hashes of its pieces, 32 bytes each, one after the other.
    """

    sha256: str
    pieces: int = Field(default=1, ge=1)


class Weights(Frozen):
    """The weights of an artefact.

    Shard names are relative to `folder`, an absolute path for weights in place; None means the
    artefact's own folder. An unbound artefact has no shards and no tensors. `hashes` has the
    tensors that moec packed, which it hashed while it wrote them. Packed shards list them by our
    names; `published` ones are those of a checkpoint (`moec.weights.packed.published`). `card` is
    the hash of the model card beside them, but for its proof.
    """

    mode: WeightMode
    folder: str | None = None
    shards: dict[str, ShardRef] = Field(default_factory=dict)
    tensors: dict[str, TensorRef] = Field(default_factory=dict)
    hashes: dict[str, TensorHash] = Field(default_factory=dict)
    published: bool = False
    card: str | None = None

    def data_folder(self, part: str) -> str:
        """The folder to which the external data of a part's graph is relative.

        It is relative to the folder of the shards, and is the graph's own folder if all shards lie
        below that: then every program finds them. Else it is ".", and a session option has to say
        where that is.
        """
        own, files = PurePosixPath(part).parent, {ref.file for ref in self.tensors.values()}
        below = all(PurePosixPath(name).is_relative_to(own) for name in (*self.shards, *files))
        return str(own) if self.folder is None and self.shards and below else "."


class Port(Frozen):
    """An input or output of a graph; a symbolic size in its shape is a name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class Ports(Frozen):
    """The inputs and outputs of a graph."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


class SessionOptions(Frozen):
    """ONNX Runtime session options.

    `entries` are config entries by key; the other fields are attributes of ONNX Runtime's class.
    """

    entries: dict[str, str] = Field(default_factory=dict)
    execution_order: Literal["DEFAULT", "PRIORITY_BASED"] = "DEFAULT"
    enable_mem_pattern: bool = True


class Engine(Frozen):
    """A TensorRT engine of an artefact.

    Attributes:
        file: the engine file, relative to the artefact.
        built: how the build went.
        bindings: the weights that the engine takes as inputs.
        plugins: the libraries that must be loaded before the engine.
        files: the files of the engine and its plugins. `Manifest.files` does not list them, so that
            an engine can be built again.
    """

    file: str
    built: Built
    bindings: tuple[str, ...] = ()
    plugins: tuple[str, ...] = ()
    files: dict[str, File] = Field(default_factory=dict)


class Build(Frozen):
    """How the build of an artefact went.

    The first three say how one run went. They are known to the process that built the artefact, and
    are not stored.

    Attributes:
        seconds: duration of each stage, by name.
        peak_bytes: the most resident memory of the building process.
        bytes_read: bytes of the checkpoint that packing read.
        bytes_written: bytes of all files that were written.
        bytes_copied: bytes of weights that were copied unchanged.
        bytes_packed: bytes of weights that were packed.
    """

    seconds: dict[str, float] = Field(default_factory=dict)
    peak_bytes: int = 0
    bytes_read: int = 0
    bytes_written: int
    bytes_copied: int
    bytes_packed: int = 0


#: what `manifest.json` leaves out
_OF_ONE_RUN = {"build": {"seconds", "peak_bytes", "bytes_read"}}


class _Check(BaseModel):
    """The fields of a check that are shown; a report may have more."""

    name: str
    kind: str
    found: float | None
    limit: float
    detail: str
    passed: bool


class _Report(BaseModel):
    """The fields of a report that are shown; it may have more."""

    subject: str
    engine: str
    reference: str
    precision: str
    seed: int
    tokens: list[int]
    checks: list[_Check]
    notes: list[str]
    passed: bool
    first_divergence: str | None


class Manifest(Frozen):
    """The whole of `manifest.json`.

    Attributes:
        opset: ONNX's; None for graphs that are not ONNX.
        checkpoint: the folder of the weights; None while the artefact is unbound.
        adapters: the folders of the LoRA adapters that are merged into the weights, in order.
        inputs, outputs: those of the decoder.
        vision: those of the vision tower, if the model has one.
        mtp: those of the layer of multi-token prediction, if it is built.
        packings: how moec packs each weight. The key is the name of the first tensor that this
            makes. Empty if all weights are the checkpoint's own bytes.
        presets: sets of session options for ONNX Runtime, by name.
        options: the sizes that TensorRT engines are built for.
        engines: the TensorRT engines, by part; a build does not run them.
        parity: the report of the last proof. Nothing else in the manifest speaks of accuracy.
        digest: the SHA-256 of all other fields, by `digest_of`. Older versions wrote none.
    """

    format: Literal["moec/1"] = "moec/1"
    spec: ModelSpec
    target: str
    dialect: str
    opset: int | None = None
    precision: str
    checkpoint: str | None
    adapters: tuple[str, ...] = ()
    weights: Weights
    files: dict[str, File]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    vision: Ports | None = None
    mtp: Ports | None = None
    packings: dict[str, Packing] = Field(default_factory=dict)
    presets: dict[str, SessionOptions] = Field(default_factory=dict)
    options: EngineOptions | None = None
    engines: dict[str, Engine] = Field(default_factory=dict)
    versions: dict[str, str]
    build: Build
    parity: dict[str, Any] | None = None
    digest: str | None = None

    @field_validator("parity")
    @classmethod
    def _is_a_report(cls, parity: dict[str, Any] | None) -> dict[str, Any] | None:
        if parity is not None:
            _Report.model_validate(parity)
        return parity

    def sealed(self) -> Self:
        """The same manifest with the digest of its content."""
        return self.model_copy(update={"digest": digest_of(json.loads(self.to_json()))})

    def to_json(self) -> str:
        """The text of `manifest.json`."""
        return self.model_dump_json(indent=1, exclude=_OF_ONE_RUN)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        """Refuse names that later look-ups would not find."""
        target = targets().get(self.target)
        if target and self.precision not in target.precisions:
            raise ValueError(f"precision {self.precision!r} is none of {self.target}")
        packed = self._packed_as()
        if packed and packed != self.precision:
            raise ValueError(f"precision {self.precision!r}, and weights that are {packed}")
        for name, ports in ((INPUT_IDS, self.inputs), (LOGITS, self.outputs)):
            if ports and name not in {port.name for port in ports}:
                raise ValueError(f"the decoder has no {name}")
        known = parameters(self.spec) if self.packings else {}
        odd = next((p.source for p in self.packings.values() if p.source not in known), None)
        if odd is not None:
            raise ValueError(f"{odd!r} is packed, and is no parameter of the spec")
        return self

    def _packed_as(self) -> str | None:
        """The precision that the narrowest packed weights stand for; None: they are all wide."""
        packings = self.packings.values()
        found = {f"int{each.bits}" for each in packings if each.bits}
        found |= {"fp8" for each in packings if each.fp8}
        return next((each for each in ("fp8", "int4", "int8") if each in found), None)

    @property
    def engine(self) -> str:
        """The engine that runs the artefact by default."""
        return find_target(self.target).engine

    @property
    def compute(self) -> str:
        """The dtype that the graph computes in: "fp32", "fp16" or "bf16"."""
        return find_target(self.target).compute(self.precision)

    def ports(self, part: str = "model") -> Ports:
        """The inputs and outputs of a part: "model", "vision" or "mtp"."""
        own = Ports(inputs=self.inputs, outputs=self.outputs)
        return {"vision": self.vision, "mtp": self.mtp}.get(part) or own

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that a session opens: "model", "vision", "mtp"."""
        further = {"vision": self.vision, "mtp": self.mtp}
        return ("model", *(part for part, ports in further.items() if ports))

    @property
    def buffered(self) -> bool:
        """Whether caches are [batch, kv_heads, slots, head_dim] buffers that a call writes into."""
        return any(len(port.shape) == 4 for port in self.inputs if is_past(port.name))

    @property
    def rewritten(self) -> dict[str, Packing]:
        """Packings by parameter, where the stored bytes differ from the checkpoint's."""
        return {
            packing.source: packing
            for packing in self.packings.values()
            if packing.names(self.spec.stored(packing.source)) != (packing.source,)
        }


def digest_of(values: dict[str, Any], without: tuple[str, ...] = ("digest",)) -> str:
    """The SHA-256 of the content of a manifest, whose JSON was parsed to `values`.

    The fields `without` do not count, and neither do spaces and the order of fields.
    """
    counted = {name: each for name, each in values.items() if name not in without}
    return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()
