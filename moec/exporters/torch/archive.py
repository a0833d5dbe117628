"""Read and write a .pt2 file as plain data: a zip archive of JSON, which nothing here evaluates.

`torch.export.load` must never see a file from a stranger: it unpickles members of the archive, and
it evaluates expressions in its JSON. moec itself needs no more than the bytes. A session builds the
program again from the spec, and a proof compares the stored file with what the exporter writes.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from torch import fx
from torch._ops import OpOverload

#: the member with the program, and the one with an id that torch draws at random
MODEL, ID = "archive/models/model.json", "archive/.data/serialization_id"
#: what a node says of its origin that is the same in every process; torch adds memory addresses
_KEPT = ("nn_module_stack", "torch_fn")
#: how much larger than the expected file a stored file may be and still be read
_TIMES, _MORE = 4, 1 << 20


def canonical(data: bytes) -> bytes:
    """The .pt2 file `data` without what differs from process to process.

    Memory addresses and the sources of nodes are dropped, and the random id becomes a hash of the
    other members.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    program = json.loads(members[MODEL])
    for node in program["graph_module"]["graph"]["nodes"]:
        found = node["metadata"]
        node["metadata"] = {name: found[name] for name in _KEPT if name in found}
    members[MODEL] = json.dumps(program).encode()
    digest = hashlib.sha256()
    for name in sorted(members.keys() - {ID}):
        digest.update(f"{name} {len(members[name])} ".encode() + members[name])
    members[ID] = f"{int.from_bytes(digest.digest()) % 10**40:040}".encode()
    return _archive(members)


def fewer_nodes(file: Path, graph: fx.GraphModule) -> str | None:
    """What is wrong with a stored .pt2 file that has less than half of the nodes of `graph`.

    None if it has more, or holds no program, which `difference` says.
    """
    expected = sum(isinstance(node.target, OpOverload) for node in graph.graph.nodes)
    try:
        data = file.read_bytes()
        program = json.loads(_members(data, len(data))[MODEL])
        found = len(program["graph_module"]["graph"]["nodes"])
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError):
        return None
    except (KeyError, TypeError, AttributeError, RecursionError):
        return None
    if 2 * found >= expected:
        return None
    return f"{found} nodes, where the exporter writes some {expected}"


def difference(file: Path, expected: bytes) -> str | None:
    """The first difference between a stored .pt2 file and the bytes that the exporter writes.

    Nothing in `file` is unpickled or evaluated, and no more is read than a few times the size of
    `expected`. None means that the bytes are the same. A file that another version of torch wrote
    differs although it may be sound, and the text says so.
    """
    most = _TIMES * len(expected) + _MORE
    try:
        if file.stat().st_size > most:
            return f"{file.stat().st_size} bytes, where the exporter writes {len(expected)}"
        data = file.read_bytes()
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    if data == expected:
        return None
    try:
        stored = _members(data, most)
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, RuntimeError) as error:
        return f"not an archive as torch writes it: {error}"
    wanted = _members(expected, len(expected))
    try:
        program = json.loads(stored.get(MODEL, b""))
        version = program["torch_version"]
        nodes = [_computes(node) for node in program["graph_module"]["graph"]["nodes"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MODEL} holds no program"
    ours = json.loads(wanted[MODEL])
    if version != ours["torch_version"]:
        return (
            f"torch {version} wrote it, and torch {ours['torch_version']} here writes other bytes; "
            + (_nodes(nodes, ours) or "the nodes and their arguments are the same")
        )
    for name in sorted(stored.keys() | wanted.keys()):
        if name not in wanted:
            return f"a member that the exporter never writes: {name}"
        if name not in stored:
            return f"no member {name}"
        if stored[name] != wanted[name]:
            detail = _nodes(nodes, ours) if name == MODEL else None
            return f"{name}: {detail or 'other bytes'}"
    return "the same members in another archive"


def _members(data: bytes, most: int) -> dict[str, bytes]:
    """Members of an archive by name, if they are stored without compression as torch does it."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        rows = archive.infolist()
        names = [row.filename for row in rows]
        if len(set(names)) < len(names) or any(row.compress_type for row in rows):
            raise ValueError("a member that is there twice or compressed")
        if sum(row.file_size for row in rows) > most:
            raise ValueError("members that are larger than the file")
        return {row.filename: archive.read(row) for row in rows}


def _archive(members: Mapping[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            row = zipfile.ZipInfo(name)  # its date is 1980
            row.create_system, row.external_attr = 3, 0
            archive.writestr(row, data)
    return file.getvalue()


def _nodes(stored: list[Any], ours: Mapping[str, Any]) -> str | None:
    """The first node that differs; None if every node is the same."""
    expected: Iterator[Any] = map(_computes, ours["graph_module"]["graph"]["nodes"])
    for index, (found, wanted) in enumerate(zip_longest(stored, expected)):
        if found != wanted:
            names = [repr(each["target"])[:80] if each else "nothing" for each in (found, wanted)]
            return f"node {index} is {names[0]}, where the exporter writes {names[1]}" + (
                " with other arguments" if names[0] == names[1] else ""
            )
    return None


def _computes(node: Mapping[str, Any]) -> dict[str, Any]:
    """What a node computes, without remarks on its origin."""
    return {name: node[name] for name in ("target", "inputs", "outputs")}
