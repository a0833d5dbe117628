"""What FP8 costs on the trained checkpoint, by scheme, against float32's perplexity."""

from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

import moec
from moec.exporters.export import export
from moec.runtime.proof.cost import cost
from moec.spec.calibration import Calibration
from moec.spec.scheme import SCHEMES
from tests.proofs import assert_passed

pytestmark = pytest.mark.full

PERPLEXITY = 13.3217
#: scheme, caches -> largest change of perplexity, largest share of tokens whose experts are others
LIMITS = {
    ("meta", None): (0.005, 0.02),
    ("dynamic", None): (0.01, 0.06),
    ("deepseek", None): (0.01, 0.06),
    ("modelopt", "wide"): (0.025, 0.06),
    ("modelopt", "fp8"): (0.03, 0.08),
}


@pytest.fixture(scope="module")
def scales(tiny: Path, golden: dict[str, Tensor]) -> Calibration:
    """Calibrated on other tokens than those that are evaluated."""
    return moec.calibrate(tiny, golden["input_ids"])


@pytest.mark.parametrize(
    "scheme, cache",
    [
        each if each == ("meta", None) else pytest.param(*each, marks=pytest.mark.slow)
        for each in LIMITS
    ],
)
def test_perplexity_and_routers(
    scheme: str, cache: str | None, tiny: Path, golden: dict[str, Tensor], scales: Calibration,
    tmp_path: Path,
) -> None:  # fmt: skip
    art = export(
        tiny, precision="fp8", scheme=scheme, cache=cache, out=tmp_path / "art",
        scales=scales if SCHEMES[scheme].static else None,
    )  # fmt: skip
    found = cost(art, "bf16", golden["eval_ids"])
    assert found.reference_perplexity == pytest.approx(PERPLEXITY, rel=1e-4)
    perplexity, flips = LIMITS[scheme, cache]
    assert abs(found.perplexity / PERPLEXITY - 1) < perplexity
    assert 0 < found.router_flips < flips
    assert 0 < found.kl < 0.1 and found.same_choice > 0.85
    assert list(found.layers) == [f"layers.{i}" for i in range(8)]
    assert all(0 < each < 0.2 for each in found.layers.values())


@pytest.mark.slow
def test_the_command_line_from_calibration_to_cost(
    tiny: Path, golden: dict[str, Tensor], tmp_path: Path, cli: object,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run = cli
    assert callable(run)
    np.save(tmp_path / "rows.npy", golden["input_ids"].numpy())
    scales, art = tmp_path / "scales.json", tmp_path / "art"
    code, err = run("calibrate", tiny, "--tokens", tmp_path / "rows.npy", "--out", scales)
    assert (code, err) == (0, "")
    code, err = run(
        "build", "--checkpoint", tiny, "--precision", "fp8", "--scheme", "modelopt",
        "--scales", scales, "--out", art, "--no-validate",
    )  # fmt: skip
    assert (code, err) == (0, "")
    page = tmp_path / "report.html"
    code, _ = run("validate", art, "--tokens", 60, "--reference", "bf16", "--html", page)
    assert code == 0 and "router flips" in page.read_text()
    parity = moec.artefact.artefact.open_artefact(art).manifest.parity  # type: ignore[attr-defined]
    assert parity and parity["passed"] and parity["cost"]["router_flips"] > 0
    parity = moec.artefact.artefact.open_artefact(art).manifest.parity  # type: ignore[attr-defined]
    assert_passed(parity)
    assert parity and parity["cost"]["router_flips"] > 0
    assert parity["cost"]["text"].startswith("rows that the reference drew")
    monkeypatch.setattr("moec.runtime.bench.bench.PEERS", ())  # which take half a minute to compile
    code, err = run("bench", art, "--prompt-tokens", 8, "--new-tokens", 4, "--rounds", 1)
    assert (code, err) == (0, "")
    code, _ = run("generate", art, "--prompt", "def main(", "--max-new-tokens", 4)
    assert code == 0
