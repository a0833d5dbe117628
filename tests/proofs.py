"""What a test says of a proof that should have passed."""

from collections.abc import Mapping
from typing import Any

from moec.runtime.proof.report import Report, cells


def assert_passed(proof: Report | Mapping[str, Any] | None) -> None:
    """`proof` has passed; if not, name its failing checks, and what runs the same proof again."""
    assert proof is not None, "no proof was recorded"
    data = proof.to_dict() if isinstance(proof, Report) else proof
    if data["passed"]:
        return
    failed = ["  ".join(cells(check)) for check in data["checks"] if not check["passed"]]
    raise AssertionError(
        "\n".join(
            [
                f"the proof of {data['subject']} failed: {len(failed)} of {len(data['checks'])}",
                f"{data['engine']} against {data['reference']}, {data['precision']}",
                f"seed {data['seed']}, rows of {data['tokens']} tokens",
                *failed,
                *data["notes"],
            ]
        )
    )
