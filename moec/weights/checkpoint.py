"""Read and check the index and the shard headers of a checkpoint folder, without its weights."""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from shlex import quote

from moec.spec.bounded.own import find_own, is_regular
from moec.spec.errors import refuse
from moec.spec.fields import read_own_json, shown
from moec.spec.hf.forms import INDEX, LISTS, SINGLE, checkpoint_folder, refuse_other_form
from moec.weights.shard import Shard, TensorEntry, read_shard
from moec.weights.trust.links import own_shard

#: the option with which a user names a folder that links may lead to
OPTION = "--weights-from"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint folder: its shards, and where the bytes of every tensor are, by key.

    `named` is a further folder in which the user lets links to shards end. `listed_in` is the file
    of the folder that the user chose, which lists the weights. `adapters` are the folders of the
    LoRA adapters that its tensors are changed by.
    """

    folder: Path
    shards: tuple[Shard, ...]
    tensors: dict[str, TensorEntry]
    named: Path | None = None
    listed_in: str = ""
    adapters: tuple[Path, ...] = ()

    @property
    def folders(self) -> set[Path]:
        """The folders that its files lie in."""
        return {self.folder, *self.adapters, *(shard.path.parent for shard in self.shards)}

    @property
    def source(self) -> Path:
        """The path that names this checkpoint: its folder, or the file that the user chose."""
        return self.folder.resolve() / self.listed_in

    def companion(self, name: str) -> Path | None:
        """The real path of a file beside the weights, such as a tokenizer; None if there is none.

        Raises:
            MoecError: the file is a link that leads out of the checkpoint.
        """
        return find_own(self.folder, name)


def read_checkpoint(source: str | Path, named: Path | None = None) -> Checkpoint:
    """Read the index and all shard headers of the Hugging Face checkpoint in a folder.

    `source` is the folder, or the index or the single shard in it, which says which of the two
    counts. `named` is a further folder in which the user lets links to shards end.

    Raises:
        MoecError: the folder has no weights, or both an index and a single shard; the index is a
            link that leads out of the folder, or names a file outside it; a shard is where this
            user allows none, missing or cut short; or the index and the shards list different
            tensors.
    """
    source = Path(source)
    folder = checkpoint_folder(source) or source
    chosen = source.name if folder != source else ""
    files = _read_index(folder / INDEX) if (chosen or _list_of(folder)) == INDEX else {SINGLE: None}
    shards, tensors = [], {}
    for name, listed in files.items():
        shard = read_shard(_resolve(folder, name, named), name)
        found = set(shard.tensors)
        if listed is not None and found != listed:
            odd = sorted(found ^ listed)[0]
            refuse(
                f"{folder / INDEX}: {odd}",
                f"the index lists it in {name}, which does not hold it"
                if odd in listed
                else f"{name} holds it, but the index does not list it",
                "the same tensors in the index as in its shards",
                "download the index and the shards of one revision",
            )
        shards.append(shard)
        tensors.update(shard.tensors)
    return Checkpoint(folder, tuple(shards), tensors, named, chosen)


def _list_of(folder: Path) -> str:
    """The name of the file that lists the weights of `folder`."""
    found = [name for name in LISTS if (folder / name).exists()]
    if len(found) == 1 or (found and set(_read_index(folder / INDEX)) == {SINGLE}):
        return found[0]
    if found:
        refuse(
            folder,
            f"{INDEX} and {SINGLE}, which are not of one set of weights",
            "one of them, or the one that you mean",
            f"name that file, such as {quote(str(folder / SINGLE))}, in place of the folder",
        )
    refuse_other_form(folder)
    refuse(folder, "no safetensors weights", f"{INDEX} or {SINGLE}", "check --checkpoint")


def _read_index(path: Path) -> dict[str, set[str] | None]:
    weight_map = read_own_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        refuse(
            f"{path}: weight_map",
            "missing or empty",
            "an object that maps tensor names to files",
            "download the index again",
        )
    files: dict[str, set[str] | None] = {}
    for tensor, name in weight_map.items():
        known = isinstance(name, str) and name in files  # then it was checked
        if not known and not _stays_inside(name):
            refuse(
                f"{path}: {tensor[:200]}",
                f"file {shown(name)}",
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
    # A build writes files with other suffixes beside the shards, which could be mixed up.
    return inside and path.suffix == ".safetensors" and len(name) < 4096


def _resolve(folder: Path, name: str, named: Path | None) -> Path:
    """The real file of a shard; a Hugging Face cache links `snapshots/REV/x` to `blobs/HASH`."""
    path = folder / name
    if any(len(part) > 255 for part in path.parts) or not is_regular(path):
        refuse(path, "no such file", "the shard that the index names", "download the missing shard")
    return own_shard(path, folder, named, f"name the folder that it is in: {OPTION} DIR")
