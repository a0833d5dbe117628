"""The Python in README and docs runs as it stands."""

import os
import re
from pathlib import Path

import pytest
import torch

import moec
from tests.conftest import ROOT, TINY

pytestmark = pytest.mark.full


@pytest.mark.parametrize("page", ["README.md", "docs/formats.md"])
def test_the_code_on_a_page_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.symlink(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    moec.export(TINY, out="build/tiny")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)
    names = {"input_ids": torch.tensor([[7, 8, 9]])}
    exec(compile("\n".join(blocks), page, "exec"), names)
    assert len(blocks) >= 1 and names["logits"].shape[-1] == 4096
