"""What a proof runs: an artefact in ONNX Runtime, on a device, with one preset throughout."""

from collections.abc import Sequence
from dataclasses import dataclass

from moec.exporters.artefact import Artefact
from moec.runtime.eager import Run
from moec.runtime.ort import ort_engine
from moec.runtime.session import Session, eager_session, ort_session


@dataclass(frozen=True, slots=True)
class Subject:
    """`artefact` as it is proven; `taps` below name inner values to make visible."""

    artefact: Artefact
    device: str
    preset: str

    def session(self, taps: Sequence[str] = ()) -> Session:
        """A new session."""
        return ort_session(self.artefact, self.device, self.preset, taps)

    def tower(self, taps: Sequence[str]) -> Run:
        """The vision tower alone."""
        return ort_engine(self.artefact, self.preset, taps, "vision", self.device)

    def reference(self, taps: Sequence[str] = ()) -> Session:
        """The float32 eager reference on the same weights."""
        return eager_session(
            self.artefact.manifest.spec, self.artefact.entries(), "fp32", taps=taps
        )
