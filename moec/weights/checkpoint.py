"""A checkpoint folder: its index and shards, checked, without loading a tensor."""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from moec.spec.errors import refuse
from moec.spec.fields import read_json
from moec.weights.shard import Shard, TensorEntry, read_shard

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Every tensor of a folder by name, and the shards that hold them."""

    folder: Path
    shards: tuple[Shard, ...]
    tensors: dict[str, TensorEntry]


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """Read the index and all shard headers of `folder` (a Hugging Face checkpoint).

    Raises:
        MoecError: no weights, a broken index, a name that leaves the folder, a missing or cut
            shard, or an index and shards that disagree about which tensor is where.
    """
    folder = Path(folder)
    if (folder / INDEX).exists():
        files = _read_index(folder / INDEX)
    elif (folder / SINGLE).exists():
        files = {SINGLE: None}
    else:
        refuse(folder, "no safetensors weights", f"{INDEX} or {SINGLE}", "check --checkpoint")
    shards, tensors = [], {}
    for name, listed in files.items():
        shard = read_shard(_resolve(folder, name), name)
        found = set(shard.tensors)
        if listed is not None and found != listed:
            odd = sorted(found ^ listed)[0]
            refuse(
                f"{folder / INDEX}: {odd}",
                f"listed for {name}, not in it" if odd in listed else f"in {name}, not listed",
                "the same tensors in the index as in its shards",
                "fetch the index and the shards of one revision",
            )
        shards.append(shard)
        tensors.update(shard.tensors)
    return Checkpoint(folder, tuple(shards), tensors)


def _read_index(path: Path) -> dict[str, set[str] | None]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        refuse(f"{path}: weight_map", "missing or empty", "tensor names to files", "fetch it again")
    files: dict[str, set[str] | None] = {}
    for tensor, name in weight_map.items():
        if not _stays_inside(name):
            refuse(
                f"{path}: {tensor}",
                f"file {name!r}",
                "a relative path to a .safetensors file inside the checkpoint folder",
                "do not use this checkpoint unless you trust its source; correct the index",
            )
        names = files.setdefault(name, set())
        assert names is not None
        names.add(tensor)
    return files


def _stays_inside(name: object) -> bool:
    if not isinstance(name, str) or not name or "\\" in name or "\0" in name:
        return False
    path = PurePosixPath(name)
    inside = not path.is_absolute() and ".." not in path.parts
    # Other suffixes could be mistaken for the files that a build writes beside the shards.
    return inside and path.suffix == ".safetensors" and len(name) < 4096


def _resolve(folder: Path, name: str) -> Path:
    """The real file: a Hugging Face cache links `snapshots/REV/x` to `blobs/HASH`."""
    path = folder / name
    if any(len(part) > 255 for part in path.parts) or not path.is_file():
        refuse(path, "no such shard", "a file that the index names", "fetch the missing shard")
    return path.resolve()
