"""A checkpoint in another engine: the same numbers pass, damage fails, no engine is exit code 3.

tests/gpu has the same for vLLM.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import moec
from moec.exporters.model_card import add_proof
from moec.runtime.proof.against.compare import _by_expert, against
from moec.runtime.proof.against.engines import EngineError
from moec.spec.hf.forms import INDEX
from moec.spec.presets import PRESETS
from moec.spec.reduced import reduced
from moec.weights.name_map import read_model
from moec.weights.random import write_random_checkpoint
from tests.conftest import run_command
from tests.damage import only_shard
from tests.families import CASES
from tests.refusals import one_message, refusal
from tests.small import SMALL

SCOUT = reduced(PRESETS["tiny-scout"], 4)
MODELS = {"llama4": SCOUT.model_copy(update={"vision": None}), "qwen3": CASES["qwen3"]}


@pytest.fixture(scope="module")
def scout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scout")
    write_random_checkpoint(MODELS["llama4"], folder / "wide", seed=3)
    return moec.quantize(folder / "wide", "dynamic", folder / "fp8").path


@pytest.mark.full
def test_transformers_computes_the_same(scout: Path, tmp_path: Path) -> None:
    scout = shutil.copytree(scout, tmp_path / "own")
    page, card = tmp_path / "report.html", scout / "README.md"
    assert "Not run yet" in card.read_text()
    command = ("validate", scout, "--against", "transformers", "--tokens", 70, "--html", page)
    code, out, err = run_command(*command)
    assert code == 0 and "PASSED" in out and "transformers" in page.read_text(), out + err
    text = card.read_text()
    assert text.count("PASSED: transformers") == 1 == text.count("| greedy tokens | 100.00 %")
    assert "Not run yet" not in text and text.startswith("---\ntags")
    add_proof(scout, "another", False, [("one", "2", "<= 1", "a|b")])
    last = card.read_text()
    assert "PASSED" not in last and last.endswith("| one | 2 | <= 1 | a/b |\n")
    card.write_text("somebody's own card\n## Proof\n")
    add_proof(scout, "another", True, [])
    assert card.read_text() == "somebody's own card\n## Proof\n"


def by_expert(factors: list[float], other: float = 1.0) -> bool | None:
    """Whether tokens of experts pass, whose differences are so many times the noise."""
    count, generator = 60, torch.Generator().manual_seed(1)
    experts = torch.arange(len(factors)).repeat_interleave(count)[:, None]
    basis = torch.rand(len(experts), generator=generator, dtype=torch.float64) * 0.1 + 0.01
    off = basis * torch.tensor(factors, dtype=torch.float64).repeat_interleave(count) * other
    found = list(_by_expert(off, basis, {"layers.3.moe.router.chosen": experts}, 1e-4))
    return found[0].passed if found else None


def test_one_expert_that_is_far_off_is_seen_at_every_level_of_noise() -> None:
    """An engine may be twice as far from the reference as bf16 is; one expert may not."""
    for level in (0.5, 1.0, 2.0, 3.0):
        assert by_expert([1.0] * 8, level)
        assert by_expert([1.0] * 7 + [1.4], level)
        assert not by_expert([1.0] * 7 + [4.0], level)
    assert not by_expert([1.0] * 7 + [2.0])
    assert not by_expert([6.0] * 8), "all of them: the level has a limit too"
    assert by_expert([1.0]), "there are no other tokens"
    assert not by_expert([3.0])


@pytest.mark.parametrize("option", ["--source", "--reference", "--weights-from", "--reduced"])
def test_options_of_an_artefacts_proof_are_refused(option: str, scout: Path) -> None:
    values = () if option == "--reduced" else (scout,)
    code, _, err = run_command("validate", scout, "--against", "transformers", option, *values)
    assert code == 2 and option in err


def test_a_checkpoint_named_by_the_file_that_lists_its_weights(
    scout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `build` takes it. Another engine chooses itself where two files list weights."""
    folder, jobs = shutil.copytree(scout, tmp_path / "two"), list[dict[str, Any]]()

    def run_other(engine: str, job: dict[str, Any], python: object) -> dict[str, Any]:
        jobs.append(job)
        raise EngineError("stopped here")

    monkeypatch.setattr("moec.runtime.proof.against.compare.run_other", run_other)
    command = ("validate", folder / "model.safetensors", "--against", "transformers")
    code, out, err = run_command(*command)
    assert code == 1 and "stopped here" in out and not err, err
    assert [job["folder"] for job in jobs] == [str(folder.resolve())]
    assert "FAILED: transformers" in (folder / "README.md").read_text()
    listed = dict.fromkeys(load_file(folder / "model.safetensors"), "other.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": listed}))
    code, _, err = run_command(*command)
    assert code == 2 and f"move {INDEX} out" in err and len(jobs) == 1
    code, _, err = run_command("validate", folder, *command[2:])
    assert code == 2 and f"name that file, such as {folder}" in err.replace("\n", "")


def test_a_name_that_other_engines_cannot_have_is_no_verdict(scout: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(scout, tmp_path / "\udcff")
    code, _, err = run_command("validate", folder, "--against", "transformers")
    one_message(err, "not UTF-8")
    assert code == 2 and "Not run yet" in (folder / "README.md").read_text()


def test_another_file_is_no_checkpoint(scout: Path) -> None:
    refusal(lambda: against(scout / "config.json", "transformers"), "config.json")


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_checkpoints_of_anybody_are_compared(model: str, tmp_path: Path) -> None:
    """Wide ones too, which moec did not make; config.json need not name a class."""
    write_random_checkpoint(MODELS[model], tmp_path, seed=3)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    report = moec.validate(tmp_path, against="transformers", tokens=70)
    assert report.passed, report.first_divergence


def scale(weights: dict[str, Tensor]) -> None:
    weights["model.layers.2.feed_forward.experts.3.down_proj.weight_scale"] *= 1.05


def name(weights: dict[str, Tensor]) -> None:
    one, two = (f"model.layers.1.feed_forward.experts.{e}.up_proj.weight" for e in (0, 3))
    weights[one], weights[two] = weights[two], weights[one]


def permutation(weights: dict[str, Tensor]) -> None:
    key = "model.layers.0.self_attn.k_proj.weight"
    weights[key] = weights[key].float().flip(0).to(weights[key].dtype)


def missing(weights: dict[str, Tensor]) -> None:
    del weights["model.layers.1.feed_forward.shared_expert.up_proj.weight"]


@pytest.mark.slow
@pytest.mark.parametrize("damage", [scale, name, permutation, missing])
def test_damage_is_seen(
    damage: Callable[[dict[str, Tensor]], None], scout: Path, tmp_path: Path
) -> None:
    """The engine reads a damaged copy, and the reference the sound checkpoint."""
    shutil.copytree(scout, tmp_path / "theirs")
    only_shard(damage)(tmp_path / "theirs")
    report = against(scout, "transformers", tokens=70, theirs=tmp_path / "theirs")
    assert not report.passed and report.checks[0].passed == (damage is not missing)


@pytest.mark.slow
def test_the_code_of_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    """transformers has no class of its own for this type, and would ask for the folder's."""
    write_random_checkpoint(CASES["deepseek-moe"], tmp_path / "weights", seed=3)
    file, mark = tmp_path / "weights/config.json", tmp_path / "mark"
    named = {"AutoConfig": "configuration_own.Own"}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": named}))
    code = f"open({str(mark)!r}, 'w')\nclass Own: pass\n"
    (tmp_path / "weights/configuration_own.py").write_text(code)
    command = [sys.executable, "-m", "moec", "validate", tmp_path / "weights"]
    done = subprocess.run(
        [*command, "--against", "transformers", "--tokens", "16"], input="y\ny\n", text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 3 and "no class in transformers" in done.stderr
    assert not mark.exists()


@pytest.mark.full
def test_a_weight_that_the_engine_cannot_take_is_named(tmp_path: Path) -> None:
    """The class of transformers takes adapters of images of one kind of shape alone."""
    write_random_checkpoint(SMALL, tmp_path, seed=3)
    report = against(tmp_path, "transformers", tokens=16)
    (check,) = report.checks
    assert not check.passed and "fc1.weight: shape [32, 128], where the class" in check.detail
    assert "above report" not in check.detail and not check.detail.endswith("; ")


def test_an_engine_that_is_missing_is_no_pass(scout: Path) -> None:
    code, _, err = run_command("validate", scout, "--against", "vllm")
    assert code == 3
    one_message(err, "vllm")


def test_what_is_no_engine_or_interpreter_is_refused(scout: Path, tmp_path: Path) -> None:
    refusal(lambda: moec.validate(scout, against="llama.cpp"), "no such engine")
    here = tmp_path / "python"
    refusal(lambda: moec.validate(scout, against="vllm", python=here), "--python")
    refusal(lambda: moec.validate(scout, against="vllm", tokens=10**9), "--tokens")
    refusal(lambda: moec.validate(tmp_path, against="vllm", python=sys.executable), "config.json")
    shutil.copytree(scout, tmp_path / "both")
    (tmp_path / "both/adapter_config.json").write_text("{}")
    refusal(lambda: moec.validate(tmp_path / "both", against="vllm"), "an adapter beside")
    refusal(lambda: against(scout, "vllm", theirs=tmp_path / "both"), "an adapter beside")
    assert any("Left aside: the adapter" in each for each in read_model(tmp_path / "both")[0].notes)
