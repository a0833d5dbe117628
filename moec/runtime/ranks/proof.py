"""A proof whose engine is shared by ranks: every rank runs the whole proof, and rank 0 reports.

The engine's calls are those of all ranks together. Each rank computes the reference by itself.
"""

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moec.artefact.artefact import open_artefact
from moec.runtime.open import find_engine
from moec.runtime.proof.report import Report
from moec.runtime.ranks.rank import Part
from moec.runtime.ranks.start import Ranks
from moec.spec.sharding import Rank


def shared_validate(
    count: int, path: Path, progress: Callable[[str, int, int], None], **named: Any
) -> Report:
    """What `validate` gives, with the engine on `count` ranks.

    Raises:
        MoecError: as `validate`; ranks cannot share the artefact; or a rank failed (exit code 3).
    """
    path = path.absolute()
    artefact = open_artefact(path, named["weights_from"])
    engine = find_engine(artefact).shared(Rank(0, count))
    engine.check(artefact, named["device"])
    engine.limits(artefact, named["device"])
    seed = secrets.randbits(31) if named["seed"] is None else named["seed"]
    ranks = Ranks(count)
    try:
        named |= {"seed": seed, "progress": Part()}
        report, _ = ranks.call(None, "validate", path, part=progress, **named)
    finally:
        ranks.close()
    assert isinstance(report, Report)
    return report
