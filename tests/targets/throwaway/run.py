"""How a session opens target `throwaway`."""

from collections.abc import Sequence

from moec.artefact.artefact import Artefact
from moec.runtime.engines.eager import eager_engine
from moec.runtime.engines.engine import Engine, Limits, Run
from moec.spec.errors import refuse
from moec.spec.model import ModelSpec


def opened(artefact: Artefact, part: str, device: str, options: str, taps: Sequence[str]) -> Run:
    spec = ModelSpec.model_validate_json(artefact.graph(part).read_text())
    return eager_engine(spec, artefact.entries(), "fp32", taps, part)


def check(artefact: Artefact, device: str) -> None:
    if device != "cpu":
        refuse(f"device {device}", "throwaway", "cpu", "leave --device out", exit_code=3)


ENGINE = Engine("throwaway", "throwaway", opened, check, lambda artefact, device: Limits())
