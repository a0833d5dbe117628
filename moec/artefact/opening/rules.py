"""What the manifest of an artefact may say: names inside its folder, and session options of moec.

Anybody can write a manifest. Its names become paths, and its session options can make ONNX Runtime
write files. So names must stay inside the artefact, and session options must be the table that moec
itself writes for such weights.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from moec.artefact.manifest import NAME, Manifest
from moec.artefact.session_options import options_of
from moec.artefact.targets import find_target
from moec.spec.bounded.limits import ARTEFACT
from moec.spec.errors import refuse
from moec.spec.fields import shown
from moec.spec.hf.architectures import ARCHITECTURES

_LONGEST = 4096  # characters of a path, as Linux limits it
_BUILD_AGAIN = "do not use this artefact unless you trust its source; build it again"


def check_manifest(path: Path, manifest: Manifest) -> None:
    """Refuse a manifest with names outside the artefact, or with foreign session options.

    `path` is the artefact's folder.

    Raises:
        MoecError: the message names the field and its value.
    """
    for field, name in _names(manifest):
        if not stays_inside(name):
            refuse(
                f"{path / NAME}: {field}",
                f"the name {name!r}"[:200],
                "a relative path inside the folder, without ..",
                _BUILD_AGAIN,
            )
    size = sum(file.size for file in manifest.files.values())
    if size > ARTEFACT:
        refuse(
            f"{path / NAME}: files",
            f"{size:,} bytes, besides weights",
            f"at most {ARTEFACT:,} bytes, which is far above what moec writes",
            _BUILD_AGAIN,
        )
    for field, folder in (
        ("weights.folder", manifest.weights.folder),
        ("checkpoint", manifest.checkpoint),
        *(("adapters", each) for each in manifest.adapters),
    ):
        if folder is not None and not _is_folder_name(folder):
            refuse(f"{path / NAME}: {field}", f"{folder!r}"[:200], "an absolute path", _BUILD_AGAIN)
    if manifest.adapters and manifest.weights.mode in ("in-place", "link"):
        refuse(
            f"{path / NAME}: adapters",
            f"{len(manifest.adapters)}, beside weights that are the checkpoint's own",
            "weights that were copied or packed, with the adapters' changes",
            _BUILD_AGAIN,
        )
    if manifest.spec.architecture not in ARCHITECTURES:
        refuse(
            f"{path / NAME}: spec.architecture",
            shown(manifest.spec.architecture),
            f"one of {', '.join(ARCHITECTURES)}",
            _BUILD_AGAIN,
        )
    if (manifest.spec.text.mtp == "built") != bool(manifest.mtp):
        refuse(
            f"{path / NAME}: mtp",
            "null" if manifest.mtp is None else "inputs and outputs",
            f"what goes with spec.text.mtp {manifest.spec.text.mtp!r}",
            _BUILD_AGAIN,
        )
    _check_options(path, manifest)
    suffix = find_target(manifest.target).suffix
    for part in manifest.parts:
        if f"{part}{suffix}" not in manifest.files:
            refuse(
                f"{path / NAME}: files",
                f"no {part}{suffix}",
                "each graph that a session opens, with its size and hash",
                _BUILD_AGAIN,
            )


def stays_inside(name: str) -> bool:
    """Whether `name` is a relative path that stays inside its folder, in its shortest spelling."""
    path = PurePosixPath(name)
    return (
        0 < len(name) < _LONGEST
        and name.isprintable()
        and "\\" not in name
        and str(path) == name != "."
        and not path.is_absolute()
        and ".." not in path.parts
        and all(len(part.encode()) <= 255 for part in path.parts)
    )


def _is_folder_name(name: str) -> bool:
    path = PurePosixPath(name)
    return (
        len(name) < _LONGEST and path.is_absolute() and ".." not in path.parts and "\0" not in name
    )


def _names(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Every name of a file in the manifest, with its field."""
    yield from (("files", name) for name in manifest.files)
    yield from (("weights.shards", name) for name in manifest.weights.shards)
    for tensor, ref in manifest.weights.tensors.items():
        yield f"weights.tensors.{tensor}", ref.file
    for part, engine in manifest.engines.items():
        for name in (part, engine.file, *engine.plugins, *engine.files):
            yield f"engines.{part}", name


def _check_options(path: Path, manifest: Manifest) -> None:
    own = options_of(manifest)
    if not manifest.presets or manifest.presets == own:
        return
    known = {name: each.entries for name, each in own.items()}
    odd = [
        f"{name}: {key}={value}"
        for name, each in manifest.presets.items()
        for key, value in each.entries.items()
        if known.get(name, {}).get(key) != value
    ]
    refuse(
        f"{path / NAME}: presets",
        f"session options of another artefact: {', '.join(odd or manifest.presets)}"[:300],
        f"{', '.join(own) or 'none'}, as moec writes them for these weights",
        _BUILD_AGAIN,
    )
