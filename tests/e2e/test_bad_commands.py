"""A command that cannot be run ends with one message and exit code 2; the disk stays as it was."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.damage import EMBED, FIRST, Damage, config, cut, tensors, text
from tests.refusals import one_message
from tests.trees import tree

ROOT = Path(__file__).parents[2]

#: what is wrong -> (the command line, what the message must name)
COMMANDS: dict[str, tuple[str, str]] = {
    "no source": ("build", "0 sources"),
    "two sources": ("build --variant scout --checkpoint CHECKPOINT", "2 sources"),
    "an unknown variant": ("build --variant herd", "herd"),
    "a spec file that is not there": ("build --spec gone.yaml", "gone.yaml"),
    "a preset for a spec file": ("build --spec scout", "scout"),
    "a checkpoint that is not there": ("build --checkpoint gone", "gone"),
    "a preset for a checkpoint": ("build --checkpoint scout", "scout"),
    "an unknown target": ("build --variant scout --target tpu", "tpu"),
    "a target of an odd size": ("build --variant scout --target tensorrt --piece 0", "--piece"),
    "a scheme of another precision": ("build --variant scout --scheme meta", "--precision fp8"),
    "a scheme that is none": ("build --variant scout --precision fp8 --scheme nf4", "deepseek"),
    "a cache of another kind": ("build --variant scout --precision fp8 --cache int8", "wide"),
    "an unknown placement": ("build --checkpoint CHECKPOINT --weights cloud", "cloud"),
    "bind without an artefact": ("bind gone --checkpoint CHECKPOINT", "gone"),
    "bind without a checkpoint": ("bind ARTEFACT --checkpoint gone", "gone"),
    "validate without an artefact": ("validate gone", "gone"),
    "inspect no artefact": ("inspect CHECKPOINT", "manifest.json"),
    "bench no artefact": ("bench gone", "gone"),
    "generate from nothing": ("generate ARTEFACT", "--prompt"),
    "generate from two things": ("generate ARTEFACT --prompt a --ids 1", "--prompt"),
    "generate from no artefact": ("generate gone --ids 1", "gone"),
    "generate from words for ids": ("generate ARTEFACT --ids one,two", "one,two"),
    "generate from ids out of range": ("generate ARTEFACT --ids 1,99999", "99999"),
    "generate from a negative id": ("generate ARTEFACT --ids=-1", "-1"),
    "generate by an unknown engine": ("generate ARTEFACT --ids 1 --engine abacus", "abacus"),
    "generate by an unknown preset": ("generate ARTEFACT --ids 1 --preset no", "preset"),
    "generate at a negative temperature": ("generate ARTEFACT --ids 1 --temperature -1", "-1"),
    "generate without a tokenizer": ("generate ARTEFACT --prompt hello", "tokenizer.json"),
    "generate with a broken tokenizer": ("generate ARTEFACT --prompt hello", "tokenizer.json"),
    "chat without a template": ("generate ARTEFACT --prompt hello --chat", "template"),
    "chat with a broken template": ("generate ARTEFACT --prompt hello --chat", "template"),
    "plan an unknown model": ("plan herd", "herd"),
    "plan an unknown precision": ("plan scout --precision int3", "int3"),
    "plan an unknown device": ("plan scout --device abacus", "abacus"),
    "plan no context": ("plan scout --context 0", "context"),
    "plan fewer tiles than none": ("plan scout --tiles -1", "tiles"),
    "plan no GPU": ("plan scout --gpus 0", "gpus"),
    "plan several GPUs in bf16": ("plan scout --precision bf16 --gpus 2", "fp8"),
    "plan more GPUs than can share": ("plan scout --precision fp8 --gpus 16", "40 query heads"),
    "show an unknown model": ("spec show herd", "herd"),
    "show in an unknown format": ("spec show scout --format toml", "toml"),
    "compare with an unknown model": ("spec diff scout herd", "herd"),
}

TOKENIZER = (ROOT / "examples" / "tiny-scout" / "tokenizer.json").read_bytes()

#: case of COMMANDS -> files that lie beside its model
BESIDE: dict[str, dict[str, str | bytes]] = {
    "generate with a broken tokenizer": {"tokenizer.json": "{}"},
    "chat without a template": {"tokenizer.json": TOKENIZER},
    "chat with a broken template": {"tokenizer.json": TOKENIZER, "chat_template.jinja": "{% for"},
}


@pytest.mark.parametrize("case", COMMANDS)
def test_a_command_that_cannot_be_run_ends_with_one_message(
    cli: Callable[..., tuple[int, str]],
    checkpoint: Path,
    artefact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    case: str,
) -> None:
    line, names = COMMANDS[case]
    for name, content in BESIDE.get(case, {}).items():
        text(name, content)(artefact)
    places = {"CHECKPOINT": checkpoint, "ARTEFACT": artefact}
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    code, err = cli(*(places.get(word, word) for word in line.split()))
    one_message(err, names)
    assert code == 2
    assert tree(tmp_path) == before


def test_a_page_that_cannot_be_written_ends_with_one_message(
    cli: Callable[..., tuple[int, str]], artefact: Path
) -> None:
    code, err = cli("validate", artefact, "--tokens", 4, "--html", artefact / "gone" / "page.html")
    one_message(err, "gone/page.html")
    assert code == 2


@pytest.mark.parametrize(
    "line",
    ["build --sparkle", "sparkle", "validate", "build --variant", "generate x --max-new-tokens 0"],
)
def test_a_line_that_is_no_command_ends_with_exit_code_2(
    cli: Callable[..., tuple[int, str]], line: str
) -> None:
    code, err = cli(*line.split())
    assert code == 2 and "Error" in err and "Traceback" not in err


def test_a_path_in_a_message_is_not_broken_over_lines(
    cli: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    path = tmp_path / ("long " * 40).strip()
    _, err = cli("inspect", path)
    assert str(path) in err


PROCESSES: dict[str, tuple[Damage, str]] = {
    "a shard cut short": (cut(lambda header, size: (8 + header + size) // 2), FIRST),
    "an unknown config field": (config("text_config.sparkle", 3), "sparkle"),
    "a missing tensor": (tensors(lambda held: held.pop(EMBED)), EMBED),
    "an --out of something else": (
        lambda folder: (
            (folder.parent / "out").mkdir(),
            (folder.parent / "out" / "notes.txt").write_text("mine"),
        ),
        "notes.txt",
    ),
    "an --out that is a file": (lambda folder: (folder.parent / "out").write_text("x"), "/out"),
}


@pytest.mark.parametrize("case", PROCESSES)
def test_the_real_command_refuses(checkpoint: Path, tmp_path: Path, case: str) -> None:
    damage, names = PROCESSES[case]
    damage(checkpoint)
    before = tree(tmp_path)
    command = [sys.executable, "cli.py", "build", "--checkpoint", checkpoint]
    done = subprocess.run(
        [*command, "--out", tmp_path / "out"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    one_message(done.stderr, names)
    assert done.returncode == 2
    assert "Traceback" not in done.stdout
    assert tree(tmp_path) == before


def test_the_real_command_needs_a_source() -> None:
    done = subprocess.run(
        [sys.executable, "cli.py", "build"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    one_message(done.stderr, "0 sources")
    assert done.returncode == 2


#: refused for what the command line is given: nobody should wait for torch to be told
AT_ONCE = (
    "a preset for a checkpoint", "bind without an artefact", "bind without a checkpoint",
    "validate without an artefact", "inspect no artefact", "bench no artefact",
    "generate from no artefact", "plan an unknown model",
)  # fmt: skip


def test_refusals_do_not_wait_for_torch(artefact: Path, checkpoint: Path) -> None:
    places = {"ARTEFACT": str(artefact), "CHECKPOINT": str(checkpoint)}
    lines = [[places.get(word, word) for word in COMMANDS[each][0].split()] for each in AT_ONCE]
    cut(lambda header, size: (8 + header + size) // 2)(checkpoint)
    lines.append(["build", "--checkpoint", str(checkpoint)])
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from moec.cli import main\n"
        f"for line in {lines}:\n"
        "    sys.argv = ['moec', *line]\n"
        "    try: main()\n"
        "    except SystemExit as ended: print(ended.code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["2"] * len(lines), done.stderr
