"""The card beside a checkpoint keeps what others wrote when a proof is added."""

from pathlib import Path

import pytest

import moec
from moec.artefact.artefact import open_artefact, verify_files
from moec.exporters.model_card import add_proof
from moec.spec.errors import MoecError
from moec.spec.presets import PRESETS
from moec.spec.reduced import reduced
from moec.weights.random import write_random_checkpoint

LLAMA4 = reduced(PRESETS["tiny-scout"], 4).model_copy(update={"vision": None})


@pytest.fixture
def llama4(tmp_path: Path) -> Path:
    write_random_checkpoint(LLAMA4, tmp_path / "wide", seed=3)
    return tmp_path / "wide"


@pytest.mark.parametrize(
    "text", ["# My evaluation\n71.3\n", "## Mine\n", "three weeks of work\n", "| my | table |\n"]
)
def test_a_proof_keeps_what_somebody_wrote_below_it(
    text: str, llama4: Path, tmp_path: Path
) -> None:
    art = moec.export(llama4, "onnx", "fp8", tmp_path / "art").path
    with (art / "README.md").open("a") as card:
        card.write(f"\n{text}")
    for passed in (True, False, True):
        add_proof(art, "one against the other", passed, [("logits", "0", "1", "")])
        card_now = (art / "README.md").read_text()
        assert card_now.endswith(f"\n{text}") and card_now.count("against the other") == 1


def test_a_proof_in_the_card_leaves_the_artefact_whole(llama4: Path, tmp_path: Path) -> None:
    art = moec.export(llama4, "onnx", "fp8", tmp_path / "art")
    card = art.path / "README.md"
    before = card.read_text()
    add_proof(art.path, "another engine", True, [("one", "1", "<= 2", "")])
    assert card.read_text() != before and "PASSED: another engine" in card.read_text()
    verified = verify_files(open_artefact(art.path))
    assert verified.not_hashed == ("README.md: its section of the proof, and what follows",)
    assert "README.md" in verified.hashed
    moec.export(llama4, "onnx", "fp8", tmp_path / "art")  # and may be replaced
    assert card.read_text() == before
    for name, text in (("README.md", before + "\n## Licence\nmine\n"), ("NOTES.md", "mine")):
        (art.path / name).write_text(text)
        with pytest.raises(MoecError, match=name):
            moec.export(llama4, "onnx", "fp8", tmp_path / "art")
        assert (art.path / name).read_text() == text
        card.write_text(before)
    card.write_text(before.replace("made by: moec", "made by: you"))
    with pytest.raises(MoecError, match="other text than the build wrote"):
        verify_files(open_artefact(art.path))


def test_a_proof_leaves_other_sections_and_other_files(llama4: Path, tmp_path: Path) -> None:
    """The folder may be a stranger's: links there lead anywhere."""
    folder = moec.quantize(llama4, "dynamic", tmp_path / "fp8").path
    card, victim = folder / "README.md", tmp_path / "victim"
    victim.write_text("mine")
    (folder / ".README.md.draft").symlink_to(victim)
    whole = card.read_text() + "\n## Licence\nApache\n"
    card.write_text(whole)
    for verdict in (True, False):
        add_proof(folder, "it", verdict, [("one", "1", "<= 2", "")])
        assert card.read_text().endswith("\n## Licence\nApache\n")
        assert card.read_text().count("## Proof") == 1 == card.read_text().count("| one |")
    assert "FAILED: it" in card.read_text() and victim.read_text() == "mine"
    for odd in (b"\xff" + whole.encode(), whole.encode() + b"x" * (1 << 20), b"no such section"):
        card.write_bytes(odd)
        add_proof(folder, "it", True, [])
        assert card.read_bytes() == odd
    card.unlink()
    card.symlink_to(victim)
    add_proof(folder, "it", True, [])
    assert victim.read_text() == "mine"
