"""What a stranger wrote is printed as it is: it can neither colour the terminal nor hide."""

import copy
import io
import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moec.artefact.artefact import open_artefact, write_manifest
from moec.cli import app
from moec.cli.output import console, write
from moec.runtime.proof.report import Check, Report
from moec.spec.files import dump_yaml
from moec.spec.presets import PRESETS
from tests.conftest import run_command
from tests.refusals import one_message

ODD = "[red]a[/red] [/b] :smile: [link=file:x]y[/link]"
#: colour, title of the window, C1, text direction, start of the line, a false line of its own
STEERING = "\x1b[31m\x1b]0;t\x07\x9b1m\u202e\r\nPASSED\x7f"
SHOWN = r"\x1b[31m\x1b]0;t\x07\x9b1m\u202e\r\nPASSED\x7f"


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_width", 300)


def _printed(*line: object, code: int = 0) -> str:
    """What a command prints, without blanks: a table breaks its title."""
    done = CliRunner().invoke(app, [*map(str, line)])
    assert done.exit_code == code, done.output
    return re.sub(r"[\s│┃]", "", done.output)


def _steered(folder: Path, name: str) -> None:
    """Put `name` wherever a manifest has free text."""
    manifest = folder / "manifest.json"
    held = json.loads(manifest.read_text())
    held["spec"] |= {"name": name, "notes": [name]}
    held["checkpoint"] = f"/{name}"
    held["build"]["seconds"] = {name: 1.0}
    check = {"kind": "error", "found": 2.0, "limit": 1.0, "passed": False, "name": name}
    words = ("subject", "engine", "reference", "precision", "first_divergence")
    held["parity"] = dict.fromkeys(words, name) | {
        "checks": [check | {"detail": name}],
        "notes": [name],
        "tokens": [1],
        "seed": 1,
        "passed": False,
    }
    manifest.write_text(json.dumps(held))


def test_nothing_in_a_manifest_steers_the_terminal(artefact: Path) -> None:
    _steered(artefact, STEERING)
    code, out, err = run_command("inspect", artefact)
    assert code == 0 and out.count("\\x1b]0;t") > 8, err
    assert out.replace("\n", "").isprintable() and "\nPASSED" not in out
    code, out, err = run_command("inspect", artefact, "--json")
    assert code == 0 and out.isascii() and out.replace("\n", "").isprintable()
    assert json.loads(out)["spec"]["name"] == STEERING


def test_a_report_of_another_form_is_refused(artefact: Path) -> None:
    """The report in a manifest is plain data: whatever its form, there is one message."""
    manifest = artefact / "manifest.json"
    held = json.loads(manifest.read_text())
    for report in ({"x": 1}, {"engine": 1}, {"checks": "x", "precision": 1, "reference": 2}):
        manifest.write_text(json.dumps({**held, "parity": report}))
        code, _, err = run_command("inspect", artefact)
        one_message(err, "parity")
        assert code == 2


def test_a_manifest_of_any_form_ends_with_one_message(artefact: Path) -> None:
    """Each field down to the second level becomes another type of JSON."""
    manifest = artefact / "manifest.json"
    sound = json.loads(manifest.read_text())
    values = itertools.cycle((None, True, -1, 2**70, 1.5, "", "\x1b", [], ["x"], {}, {"x": 1}))
    places = [(a,) for a in sound] + [(a, b) for a in sound for b in _inside(sound[a])]
    for place in places:
        for value in itertools.islice(values, 1):
            held = copy.deepcopy(sound)
            inner = held if len(place) == 1 else held[place[0]]
            inner[place[-1]] = value
            manifest.write_text(json.dumps(held))
            code, out, err = run_command("inspect", artefact)
            assert code in (0, 1, 2) and "a bug of moec" not in err, (place, value, err)
            assert "\x1b" not in out + err
            if code:
                one_message(err, "")


def _inside(value: object) -> list[Any]:
    """The first places inside a value of JSON."""
    places = value if isinstance(value, dict) else range(len(value) if type(value) is list else 0)
    return list(places)[:4]


def test_text_for_a_terminal_and_for_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal, shown in ((True, "a\n\tb\\x1b[1m\\rc"), (False, "a\n\tb\x1b[1m\rc")):
        out = io.StringIO()
        monkeypatch.setattr(out, "isatty", lambda terminal=terminal: terminal)
        monkeypatch.setattr("sys.stdout", out)
        write("a\n\tb\x1b[1m\rc")
        assert out.getvalue() == shown


def test_a_page_escapes_every_field(tmp_path: Path) -> None:
    odd = "<script>\x1b[1m\u202e&\ud83d"
    cost = {"reference": odd, "reference_perplexity": 2.0, "perplexity": 3.0, "kl": 0.1, "kl_99": 1}
    cost |= {"same_choice": 1, "flips": {odd: 1}, "router_flips": 1, "layers": {odd: 1}}
    check = Check(odd, "error", 2.0, 1.0, odd)
    report = Report(odd, odd, odd, odd, 1, [3], False, [check], [odd], {}, cost)
    report.to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script>" not in page and page.isprintable()
    assert page.count("&lt;script&gt;\\x1b[1m\\u202e&amp;\\ud83d") == 11


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
