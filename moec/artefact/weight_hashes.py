"""Hash the weights of an artefact where they lie, and compare them with the manifest."""

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from moec.artefact.manifest import Weights
from moec.spec.errors import refuse
from moec.weights.packed.hashed import file_sha256, tensor_sha256


def hash_files(paths: Iterable[Path], progress: Callable[[int, int], None]) -> dict[Path, str]:
    """The SHA-256 of files, on all cores. `progress` is called with the files done and in all."""
    paths, found = list(paths), {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for path, sha256 in zip(paths, pool.map(file_sha256, paths), strict=True):
            found[path] = sha256
            progress(len(found), len(paths))
    return found


def verify_weights(weights: Weights, paths: Mapping[str, Path]) -> set[str]:
    """Hash each weight file and each tensor that has a hash in the manifest.

    `paths` are those of the shards, by name.

    Returns:
        The names of the files of which every byte was hashed.

    Raises:
        MoecError: a file or a tensor has changed; the message names the first one (exit code 1).
    """
    files = {name: shard.sha256 for name, shard in weights.shards.items() if shard.sha256}
    tensors = {name: weights.hashes[name] for name in weights.tensors if name in weights.hashes}
    jobs: list[tuple[str, str, Callable[[], str]]] = [
        (f"{paths[name]}", sha256, partial(file_sha256, paths[name]))
        for name, sha256 in files.items()
    ]
    for name, each in tensors.items():
        ref = weights.tensors[name]
        file = paths[ref.file]
        again = partial(tensor_sha256, file, ref.offset, ref.length, each.pieces)
        jobs.append((f"{file}: {name}", each.sha256, again))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda job: job[2](), jobs)
        for (where, expected, _), sha256 in zip(jobs, found, strict=True):
            if sha256 != expected:
                pool.shutdown(wait=False, cancel_futures=True)
                refuse(
                    where,
                    f"sha256 {sha256}",
                    f"{expected}, as it was when the artefact was built",
                    "build the artefact again; if the checkpoint changed, download it again",
                    exit_code=1,
                )
    rest = {ref.file for name, ref in weights.tensors.items() if name not in tensors}
    return {*files, *({weights.tensors[name].file for name in tensors} - rest)}
