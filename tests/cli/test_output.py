"""What a stranger wrote is printed as it is: it can neither colour the terminal nor hide."""

import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moec.artefact.artefact import open_artefact, write_manifest
from moec.cli import app
from moec.cli.output import console
from moec.spec.files import dump_yaml
from moec.spec.presets import PRESETS

ODD = "[red]a[/red] [/b] :smile: [link=file:x]y[/link]"


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_width", 300)


def _printed(*line: object, code: int = 0) -> str:
    """What a command prints, without blanks: a table breaks its title."""
    done = CliRunner().invoke(app, [*map(str, line)])
    assert done.exit_code == code, done.output
    return re.sub(r"[\s│┃]", "", done.output)


def test_names_in_a_manifest_are_no_markup(built: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(built, tmp_path / "[bold]art[nothing]"))
    art = open_artefact(folder)
    spec = art.manifest.spec.model_copy(update={"name": ODD, "notes": (f"note {ODD}",)})
    check = {"kind": "error", "found": 2.0, "limit": 1.0, "passed": False}
    parity = {
        "subject": f"subject {ODD}",
        "engine": ODD,
        "reference": f"reference {ODD}",
        "precision": "fp32",
        "seed": 1,
        "tokens": [3],
        "checks": [
            check | {"name": f"name {ODD}", "detail": ""},
            check | {"name": "embed", "detail": f"detail {ODD}"},
        ],
        "notes": [f"remark {ODD}"],
        "passed": False,
        "first_divergence": ODD,
    }
    write_manifest(folder, art.manifest.model_copy(update={"spec": spec, "parity": parity}))
    printed = _printed("inspect", folder)
    for before in ("note: note", "subject", "name", "detail", "note: remark", "first at"):
        assert f"{before} {ODD}".replace(" ", "") in printed, before
    assert "[bold]art[nothing]" in printed


def test_names_in_a_spec_are_no_markup(tmp_path: Path) -> None:
    path = tmp_path / "[red]spec[nothing].yaml"
    changed = {"name": ODD, "provenance": "estimated"}
    path.write_text(dump_yaml(PRESETS["scout"].model_copy(update=changed)))
    assert "[red]spec[nothing]" in _printed("spec", "diff", path, "scout", code=1)
    assert ODD.replace(" ", "") in _printed("plan", path)
