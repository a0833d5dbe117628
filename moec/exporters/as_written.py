"""Compare the files of an artefact with those that the exporter writes now: graphs node for node.

`moec.exporters.beside` compares the files beside the graphs.
"""

import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import fx

from moec.artefact.artefact import Artefact
from moec.artefact.engine_options import EngineOptions
from moec.artefact.manifest import NAME, Ports
from moec.artefact.placement import Bound
from moec.exporters.beside import beside
from moec.exporters.builder import Wanted, builder_for, turned_experts
from moec.exporters.stages import no_collection
from moec.exporters.torch.archive import difference, fewer_nodes

#: bytes of the largest stored graph whose nodes are counted before the expected one is written
_SMALL = 1 << 26


@no_collection()
def other_files(artefact: Artefact) -> dict[str, str]:
    """The files that are not what the exporter writes now, and the first difference of each.

    Of the manifest, this is what it says of the graphs: inputs, outputs and opset. The files are
    written again from the manifest, at full size; no weights are read. The result is empty if every
    file has the same bytes, or says the same. Whatever is not compared here by name, such as
    annotations that this version of onnx does not know, is a difference.
    """
    with tempfile.TemporaryDirectory(prefix="moec-graphs-") as folder:
        found: dict[str, str | None] = {}
        written = _write(artefact, Path(folder), found)
        for name, file in written.items():
            stored = artefact.path / name
            if name not in artefact.graphs:
                found[name] = "the manifest lists no such file"
            elif stored.read_bytes() != file.read_bytes():
                found[name] = _difference(stored, file)
        more = set(artefact.graphs) - set(written) - set(found)
        found |= dict.fromkeys(more, "moec writes no such file")
        found |= beside(artefact, Path(folder))
        return {name: what for name, what in found.items() if what}


def _write(artefact: Artefact, folder: Path, found: dict[str, str | None]) -> dict[str, Path]:
    """Write every file into `folder` as a build or `bind` would write it; the graphs, by name.

    A program that is far too small for the model is not written, which may take minutes for a
    stranger's manifest; its difference goes into `found`.

    What a checkpoint gives to the files beside the graphs comes from the artefact, or from its
    checkpoint if that is at hand.
    """
    manifest, builder = artefact.manifest, builder_for(artefact)
    options = manifest.options or EngineOptions()
    wanted = Wanted(
        manifest.spec,
        manifest.precision,
        manifest.compute,
        manifest.dialect,
        options,
        turned_experts(manifest.packings),
    )
    bound = None
    if manifest.weights.mode != "unbound":
        root, places = artefact.weights_folder, manifest.weights.tensors
        # the graph names shards as the manifest does, whatever links lead to them
        entries = {
            name: replace(entry, file=root / places[name].file)
            for name, entry in artefact.stored().items()
        }
        bound = Bound(entries, root, manifest.weights)
    files = {}
    for part, graph in builder.graphs(wanted).items():
        stored = artefact.graph(part)
        file = folder / stored.relative_to(artefact.path)
        count = fewer_nodes if file.suffix == ".pt2" else _fewer_nodes
        if _is_small(stored) and (what := count(stored, graph)):
            found[file.relative_to(folder).as_posix()] = what
            continue
        model, _ = builder.lower(wanted, graph, part)
        file.parent.mkdir(parents=True, exist_ok=True)
        builder.save_unbound(model, file)
        if bound:
            builder.save_bound(model, file, bound.seen_from(part), options)
        files[file.relative_to(folder).as_posix()] = file
        if part in manifest.parts:
            found[NAME] = found.get(NAME) or _other_ports(
                manifest.ports(part), builder.ports(model)
            )
    if manifest.opset != builder.opset:
        found[NAME] = f"opset: {manifest.opset}, expected {builder.opset}"
    if builder.beside:
        builder.beside(folder, artefact.path, manifest, artefact.companion)
    return files


def _other_ports(said: Ports, expected: Ports) -> str | None:
    """The first input or output of a graph that the manifest tells otherwise; None: there is none.

    Sessions and other programs read there what they must feed.
    """
    for kind in ("inputs", "outputs"):
        mine, right = ({x.name: x for x in getattr(each, kind)} for each in (said, expected))
        for name in (*right, *mine):
            found, wanted = mine.get(name), right.get(name)
            if found != wanted:
                shown = (f"{x.dtype} {list(x.shape)}" if x else "none" for x in (found, wanted))
                return "{}.{}: {}, expected {}".format(kind, name[:100], *shown)
        if [*mine] != [*right] or len(mine) != len(getattr(said, kind)):
            return f"{kind}: another order, or one name twice"
    return None


def _is_small(file: Path) -> bool:
    """Whether a stored graph may be too small for its model; a larger one is not read for that."""
    try:
        return file.stat().st_size <= _SMALL
    except OSError:
        return False


def _fewer_nodes(file: Path, graph: fx.GraphModule) -> str | None:
    """The same as `fewer_nodes` for ONNX: layers may share functions, so a quarter is enough."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        found = len(onnx.load(file, load_external_data=False).graph.node)
    except (OSError, DecodeError):
        return None
    expected = sum(node.op == "call_function" for node in graph.graph.nodes)
    if 4 * found >= expected:
        return None
    return f"{found} nodes, where the exporter writes some {expected}"


def _difference(stored: Path, written: Path) -> str | None:
    """How the graph in `stored` differs from that in `written`.

    None if both say the same, piece by piece: only protobuf's encoding and the version of the
    program that wrote the file may differ.
    """
    if stored.suffix == ".pt2":
        return difference(stored, written.read_bytes())
    if stored.suffix != ".onnx":
        return "another program"
    import onnx
    from google.protobuf.message import DecodeError

    try:
        left, right = (onnx.load(file, load_external_data=False) for file in (stored, written))
    except (OSError, DecodeError) as error:
        return f"it cannot be read: {error}"
    left.producer_version = right.producer_version = ""
    mine, theirs = (dict(_numbered(_of_model(model))) for model in (left, right))
    for place, expected in theirs.items():  # in the order of the graph
        if place not in mine:
            return f"{place[0]}: missing"
        if mine[place] != expected:
            return f"{place[0]}: {_short(mine[place])}, expected {_short(expected)}"
    if more := [where for where, number in mine if (where, number) not in theirs]:
        return f"{more[0]}: not expected"
    same = _bytes(left) == _bytes(right)  # also what this version of onnx does not know
    return None if same else "fields that moec does not write"


Fact = tuple[str, Any]


def _numbered(facts: Iterator[Fact]) -> Iterator[tuple[tuple[str, int], Any]]:
    """The same facts; where several have one place, each has a number too, so that none is lost."""
    seen = Counter[str]()
    for where, what in facts:
        yield (where, seen[where]), what
        seen[where] += 1


def _of_model(model: Any) -> Iterator[Fact]:
    """Everything that a model says, piece by piece: (where, what); nodes first, in their order."""
    yield from _of_graph(model.graph)
    for function in model.functions:
        at = f"function {function.name}/"
        yield from _of_nodes(function.node, at)
        yield from _rest(function, at, {"node"})
    yield from _rest(model, "model", {"graph", "functions"})


def _of_nodes(nodes: Any, at: str) -> Iterator[Fact]:
    for index, node in enumerate(nodes):
        where = f"{at}{node.name or node.output[0]}"
        wires = tuple(node.input), tuple(node.output)
        yield where, (index, node.domain, node.op_type, *wires)
        for attribute in node.attribute:
            name = f"{where}, attribute {attribute.name}"
            if attribute.HasField("g"):
                yield from _of_graph(attribute.g, f"{where}/{attribute.name}/")
                yield from _rest(attribute, name, {"g"})
            else:
                yield name, _bytes(attribute)
        yield from _rest(node, where, {"input", "output", "domain", "op_type", "attribute"})


def _of_graph(graph: Any, at: str = "") -> Iterator[Fact]:
    yield from _of_nodes(graph.node, at)
    for kind in ("input", "output", "initializer", "value_info"):
        values = getattr(graph, kind)
        yield f"{at}{kind}s", tuple(each.name for each in values)
        for each in values:
            yield f"{at}{kind} {each.name}", _bytes(each)
    known = {"node", "input", "output", "initializer", "value_info"}
    yield from _rest(graph, f"{at}graph", known)


def _rest(message: Any, at: str, known: set[str]) -> Iterator[Fact]:
    """What the fields of a message say that are not `known`: notes, annotations, metadata."""
    for field, what in message.ListFields():
        if field.name not in known:
            yield f"{at}, {field.name}", str(what).encode()


def _bytes(message: Any) -> bytes:
    found: bytes = message.SerializeToString(deterministic=True)
    return found


def _short(what: Any) -> str:
    """A piece of a graph in a few words."""
    if isinstance(what, bytes):
        return f"{len(what)} bytes of SHA-256 {sha256(what).hexdigest()[:8]}"
    if isinstance(what, tuple) and what and isinstance(what[0], int):
        _, domain, kind, inputs, outputs = what
        return f"{domain or 'ai.onnx'}::{kind}({', '.join(inputs)}) -> {', '.join(outputs)}"[:200]
    return f"{len(what)} names"
