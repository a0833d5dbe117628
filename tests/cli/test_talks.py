"""`generate --chat` without a prompt: a conversation; and files of messages that name images."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

import moec
from tests.conftest import run_command
from tests.refusals import one_message
from tests.talks import PHOTO, TEMPLATE, with_template

pytestmark = pytest.mark.full


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def art(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("talks")
    return moec.export(with_template(tiny, folder / "checkpoint"), out=folder / "art").path


def _talk(
    monkeypatch: pytest.MonkeyPatch, art: Path, typed: io.StringIO | None, *more: object
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "stdin", typed)
    return run_command("generate", art, "--max-new-tokens", 5, *more)


def test_each_line_has_a_reply(art: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    typed = f"import os\n\n/image {PHOTO}\nWhat is this?\nclass A:"
    code, out, err = _talk(monkeypatch, art, io.StringIO(typed), "--chat", "--system", "Hi")
    talk = moec.open_session(art).conversation(system="Hi")
    replies = [
        talk.say(text, images, 5)
        for text, images in (("import os", []), ("What is this?", [PHOTO]), ("class A:", []))
    ]
    assert (code, out) == (0, "".join(f"{each.text}\n" for each in replies))
    assert err.count("note: ") == err.count("as one tile") == 1 and not err.startswith("> ")
    image = _talk(monkeypatch, art, io.StringIO("What is this?\n"), "--chat", "--image", PHOTO)
    alone = moec.open_session(art).conversation().say("What is this?", PHOTO, 5)
    assert image[:2] == (0, f"{alone.text}\n")


def test_what_is_computed_anew_is_said(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = with_template(tiny, tmp_path / "c", "{{ messages | length }}" + TEMPLATE)
    art = moec.export(folder, out=tmp_path / "a").path
    code, _, err = _talk(monkeypatch, art, io.StringIO("x\ny\n"), "--chat")
    assert code == 0 and err.count("note: computed ") == 1
    assert "the chat template rewrote an earlier turn" in err


def test_a_refusal_ends_a_pipe_and_no_terminal(art: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    typed = "/image gone.png\nx\nimport os\n"
    code, out, err = _talk(monkeypatch, art, io.StringIO(typed), "--chat")
    one_message(err, "gone.png")
    assert (code, out) == (2, "")
    code, out, err = _talk(monkeypatch, art, Terminal(typed), "--chat")
    expected = moec.open_session(art).conversation().say("import os", (), 5).text
    assert (code, out) == (0, f"{expected}\n")
    one_message(err.removeprefix("> > "), "gone.png")
    assert err.count("> ") == 4


@pytest.mark.parametrize(
    "typed, more, named",
    [
        (None, ["--chat"], "stdin"),
        (io.StringIO("\udcff\n"), ["--chat"], "surrogate"),
        (io.StringIO(""), [], "--chat"),
        (io.StringIO(""), ["--system", "x", "--ids", "1"], "--system"),
    ],
)
def test_what_is_no_conversation(
    typed: io.StringIO | None,
    more: list[str],
    named: str,
    art: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code, out, err = _talk(monkeypatch, art, typed, *more)
    one_message(err, named)
    assert (code, out) == (2, "")


def _file(folder: Path, **image: Any) -> Path:
    parts = [{"type": "image", **image}, {"type": "text", "text": "What is this?"}]
    messages = [
        {"role": "user", "content": "import os"},
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "y"},
        {"role": "user", "content": "class A:"},
    ]
    path = folder / "messages.json"
    path.write_text(json.dumps(messages))
    return path


def test_a_file_of_messages_names_images_of_its_folder(art: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(PHOTO.read_bytes())
    given = "--max-new-tokens", 5, "--messages"
    path = _file(tmp_path)
    code, expected, _ = run_command("generate", art, *given, path, "--image", PHOTO)
    assert code == 0
    for key in ("path", "image"):
        path = _file(tmp_path, **{key: "photos/a.jpg"})
        assert run_command("generate", art, *given, path)[:2] == (0, expected)


@pytest.mark.parametrize(
    "image, named",
    [
        ({"path": "../secret.jpg"}, "secret.jpg"),
        ({"path": str(PHOTO)}, PHOTO.name),
        ({"path": "link.jpg"}, "link.jpg"),
        ({"path": "gone.jpg"}, "gone.jpg"),
        ({"path": "."}, "folder"),
        ({"path": 3}, "name of a file"),
        ({"path": "a\0b"}, "null"),
        ({"image": ["x"]}, "name of a file"),
        ({"url": "https://example.org/a.jpg"}, "0 images"),
    ],
)
def test_a_file_of_messages_reaches_nothing_else(
    image: dict[str, Any], named: str, art: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "talk"
    folder.mkdir()
    (tmp_path / "secret.jpg").write_bytes(PHOTO.read_bytes())
    (folder / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    code, out, err = run_command("generate", art, "--messages", _file(folder, **image))
    one_message(err, named)
    assert (code, out) == (2, "")
