"""Say what a user must name later because the user's state folder could not be written."""

from collections.abc import Iterator

from moec.artefact.artefact import Artefact
from moec.weights.trust.records import folder_is_allowed, is_allowed, state_folder


def unrecorded(artefact: Artefact) -> Iterator[str]:
    """A line for the weights, and one for the engines, that no record allows this user to open.

    Another process then asks this user to name them.
    """
    manifest, state = artefact.manifest, state_folder() or "the state folder of this user"
    if manifest.weights.folder:
        folders = {artefact.shard(name).parent for name in manifest.weights.shards}
        if not all(folder_is_allowed(each, on_disk=True) for each in folders):
            yield (
                f"{state} cannot be written: when you open the artefact, add "
                f"--weights-from {manifest.weights.folder}"
            )
    hashes = {each.sha256 for engine in manifest.engines.values() for each in engine.files.values()}
    if not all(is_allowed("native", each, on_disk=True) for each in hashes):
        yield f"{state} cannot be written: when you run the engines, add --trust-engines"
