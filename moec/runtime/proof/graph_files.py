"""Compare an artefact's graph files with what the exporter writes now."""

from collections.abc import Iterator

from moec.artefact.artefact import Artefact
from moec.exporters.as_written import other_graphs
from moec.exporters.write import versions
from moec.runtime.proof.report import Check

#: the packages whose versions decide what a graph file holds
WRITERS = ("moec", "torch", "onnx-ir")


def graph_files(artefact: Artefact, only_proof: bool, notes: list[str]) -> Iterator[Check]:
    """One check: every graph file has the nodes that this version of moec writes for the manifest.

    Other versions may write other nodes for the same numbers. If other versions built `artefact`
    and its own graph runs in this proof, a difference is therefore a remark in `notes`, and no
    failure. With `only_proof` nothing else says that the file is right, and it must be the same.
    """
    parts, others = artefact.parts, other_graphs(artefact)
    share = 1 - len(others) / len(parts)
    detail = f"{len(parts)} files, node for node"
    built, here = artefact.manifest.versions, versions()
    odd = [f"{name} {built.get(name)}" for name in WRITERS if built.get(name) != here.get(name)]
    for part, what in others.items():
        file = artefact.graph(part).relative_to(artefact.path)
        if odd and not only_proof:
            notes.append(
                f"{file} is not what this version writes; {', '.join(odd)} built it. {what}"
            )
            return
        name, detail = f"{file}: {what.partition(':')[0]}", what.partition(": ")[2] or what
        yield Check(name, "agreement", share, 1.0, detail)
    if not others:
        yield Check("graph files", "agreement", share, 1.0, detail)
