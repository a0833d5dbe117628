"""Native code in an artefact: TensorRT engines and plugin libraries.

Loading such a file runs the code in it. So a session loads one only if this user built exactly
these bytes, or says now that they may run.
"""

from collections.abc import Iterable

from moec.artefact.artefact import Artefact, file_of
from moec.spec.bounded.own import own_file
from moec.spec.errors import refuse
from moec.weights.trust.records import is_allowed


def check_native(artefact: Artefact, names: Iterable[str]) -> None:
    """Refuse native code that this user did not build and does not trust now.

    `names` are those of files in the artefact. Their bytes are hashed; what the manifest says of
    them counts for nothing here.

    Raises:
        MoecError: the message names the first file, and the command that builds it here.
    """
    rebuild = f"build it here: moec engine {artefact.path}"
    for name in names:
        path = artefact.path / name
        real = own_file(path, artefact.path, rebuild)
        if artefact.trust_engines or is_allowed("native", file_of(real).sha256):
            continue
        refuse(
            path,
            "native code that this user did not build on this machine",
            "an engine and a plugin that were built here",
            f"{rebuild}; or, if you trust its source, add --trust-engines",
        )
