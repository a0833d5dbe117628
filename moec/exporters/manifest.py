"""What an artefact says of itself: `manifest.json`, as frozen data."""

from typing import Any, Literal

from pydantic import Field

from moec.spec.model import Frozen, ModelSpec

FORMAT = "moec/1"
NAME = "manifest.json"

WeightMode = Literal["unbound", "in-place", "link", "copy"]


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


class Build(Frozen):
    """How the build went: seconds per stage, peak resident bytes of the process, bytes on disk."""

    seconds: dict[str, float]
    peak_bytes: int
    bytes_written: int
    bytes_copied: int


class Manifest(Frozen):
    """The whole of `manifest.json`.

    `inputs` and `outputs` are the decoder's, `vision` those of the vision tower where there is one.
    `rewritten` lists weights whose bytes are not the checkpoint's own, with the reason; `parity` is
    the last validation's report, and the only statement here about the numbers.
    """

    format: Literal["moec/1"] = "moec/1"
    spec: ModelSpec
    target: str
    dialect: str
    opset: int
    precision: str
    checkpoint: str | None
    weights: Weights
    files: dict[str, File]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    vision: Ports | None = None
    rewritten: tuple[str, ...] = ()
    versions: dict[str, str]
    build: Build
    parity: dict[str, Any] | None = None
