"""Compare an artefact's graph files, and those of genai, with what the exporter writes now."""

from collections.abc import Iterator

from moec.artefact.artefact import Artefact
from moec.exporters.as_written import other_files
from moec.exporters.beside import stale
from moec.exporters.versions import WRITERS, versions
from moec.runtime.proof.report import Check


def graph_files(artefact: Artefact) -> Iterator[Check]:
    """Check that every file says what this version of moec writes, and nothing else.

    The files are the graphs, and all that onnxruntime-genai reads.

    Numbers of a few calls cannot show what a graph does in all other calls, so a difference fails
    the proof even if all numbers were right. Another version of moec may have built a sound file:
    the check says so, and a new build settles it. The manifest's own word on versions decides
    nothing, because who writes a file writes the manifest too.
    """
    others = other_files(artefact)
    built, here = artefact.manifest.versions, versions()
    odd = [f"{name} {built.get(name)}" for name in WRITERS if built.get(name) != here.get(name)]
    more = f"; built with {', '.join(odd)}: build it again with this version" if odd else ""
    for file, what in others.items():
        where, _, rest = what.partition(": ")
        name = f"{file}: {where}" if rest else file
        yield Check(name, "agreement", 0.0, 1.0, f"{rest or what}{more}")
    if not others:
        detail = f"{len(artefact.parts)} files, node for node"
        if place := stale(artefact):
            detail += (
                f"; genai/ cannot be opened, because it looks for the weights in {place}, where "
                "none are since it was built: moec bind writes it anew"
            )
        yield Check("graph files", "agreement", 1.0, 1.0, detail)
