"""README and docs: their Python runs, what they name exists, the command line is as they say."""

import os
import re
from pathlib import Path

import pytest
import torch

import moec
from tests.cli_page import PAGE, page
from tests.conftest import ROOT, TINY
from tests.talks import PHOTO, with_template

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")])
#: what a page may name in backticks that starts as a path of this repository does
PATH = re.compile(r"`((?:moec|tests|benchmarks|docs|examples)/[\w./*-]*)`")
#: the target of a link, without what follows `#`; not those with a scheme
LINK = re.compile(r"\]\((?!\w+:)([^)#]+)(?:#[^)]*)?\)")
pytestmark = pytest.mark.full


@pytest.mark.parametrize("name", ["README.md", "docs/formats.md", "docs/api.md"])
def test_the_code_on_a_page_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "examples").mkdir()
    os.symlink(PHOTO, tmp_path / "examples" / PHOTO.name)
    with_template(TINY, tmp_path / "examples" / TINY.name)
    monkeypatch.chdir(tmp_path)
    moec.export("examples/tiny-scout", out="build/tiny")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.S)
    names = {"input_ids": torch.tensor([[7, 8, 9]])}
    exec(compile("\n".join(blocks), name, "exec"), names)
    assert len(blocks) >= 1 and names["logits"].shape[-1] == 4096


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_page_names_exists(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if path.name == "CHANGELOG.md":  # which also names what is gone
        named = []
    else:
        named = [each for each in PATH.findall(text) if not any(ROOT.glob(each.rstrip("/")))]
    linked = [each for each in LINK.findall(text) if not (path.parent / each).exists()]
    assert not named and not linked


def test_the_command_line_is_as_its_page_says() -> None:
    written = PAGE.read_text(encoding="utf-8")
    assert written == page(), "run: python -m tests.cli_page"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130
