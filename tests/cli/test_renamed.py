"""An option's old name works for one more version, and a note says what it is called now."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

import moec
from moec.cli.renamed import RENAMED, current_spelling
from tests.cli.test_commands import OPTIONS
from tests.refusals import one_message, refusal

Cli = Callable[..., tuple[int, str]]


def test_a_new_name_is_an_option_and_an_old_one_is_not() -> None:
    for command, names in RENAMED.items():
        for old, new in names.items():
            assert new in OPTIONS[command].split() and old not in OPTIONS[command].split()


def test_an_old_name_gives_way_to_the_new_one_in_its_own_command() -> None:
    line, notes = current_spelling(["generate", "DIR", "--preset=fast", "--ids", "1"])
    assert line == ["generate", "DIR", "--session-options=fast", "--ids", "1"]
    assert notes == ["--preset is now --session-options; the next version drops the old name"]
    for words in ([], ["bench", "DIR", "--preset", "fast"], ["validate", "DIR", "--reduced"]):
        assert current_spelling(words) == (words, [])


def test_generate_takes_the_old_name(cli: Cli, artefact: Path) -> None:
    code, err = cli("generate", artefact, "--ids", "1", "--max-new-tokens", 1, "--preset", "fast")
    assert code == 0
    assert err == "note: --preset is now --session-options; the next version drops the old name\n"
    code, err = cli("generate", artefact, "--ids", "1", "--session-options", "fast")
    assert (code, err) == (0, "")


def test_build_takes_the_old_name(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "a"
    line = "build --variant tiny-scout --target tensorrt --no-engine --no-validate --context 96"
    code, err = cli(*line.split(), "--piece", 48, "--out", out)
    assert code == 0 and "--piece is now --prefill-chunk" in err
    assert json.loads((out / "manifest.json").read_text())["options"]["piece"] == 48


def test_validate_takes_the_old_name(cli: Cli, artefact: Path) -> None:
    code, err = cli("validate", artefact, "--tokens", 8, "--twin")
    assert code == 0 and "--twin is now --reduced" in err
    assert json.loads((artefact / "manifest.json").read_text())["parity"]["twin"]


def test_the_note_comes_after_an_error(cli: Cli, tmp_path: Path) -> None:
    code, err = cli("validate", tmp_path / "gone", "--twin")
    one_message(err, "gone")
    assert code == 2 and "--twin is now --reduced" in err.splitlines()[-1]


def test_the_api_takes_old_names_with_a_warning(built: Path) -> None:
    with pytest.warns(DeprecationWarning, match="preset is now session_options"):
        moec.open_session(built, preset="fast")
    with pytest.warns(DeprecationWarning, match="on_twin is now reduced"):
        refusal(lambda: moec.validate(built, on_twin=True, reference="bf16"), "twin")
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        moec.open_session(built, session_options="fast")
        refusal(lambda: moec.validate(built, reduced=True, reference="bf16"), "reduced-size")
