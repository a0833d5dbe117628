"""generation_config.json: end tokens and sampling, as transformers takes them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Llama4ForConditionalGeneration
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
)

import moec
from moec.runtime.sampling import asked, penalised, sample
from moec.spec.files import load_spec
from moec.spec.hf.generation import unapplied
from moec.spec.model import Sampling
from tests.damage import put
from tests.refusals import refusal

FILE = "generation_config.json"


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def _says(model: Path, **fields: Any) -> None:
    (model / FILE).write_text(json.dumps(fields))


def test_end_tokens_come_from_both_files(model: Path) -> None:
    own = load_spec(model).tokens
    assert own.eos == (1,)
    for named, eos in ((7, (7, 1)), ([8, 1], (8, 1)), ([], (1,)), (None, (1,))):
        _says(model, eos_token_id=named, pad_token_id=6)
        assert load_spec(model).tokens == own.model_copy(update={"eos": eos, "pad": 6})
    (model / FILE).unlink()
    assert load_spec(model).tokens == own and load_spec(model).sampling is None


@pytest.mark.parametrize(
    "fields, sampling",
    [
        ({}, None),
        ({"temperature": 0.6, "top_p": 0.9}, None),
        ({"do_sample": False, "temperature": 0.6}, None),
        ({"do_sample": True}, Sampling(top_k=50)),  # transformers' default
        ({"do_sample": True, "top_k": None, "min_p": 0.1}, Sampling(top_k=50, min_p=0.1)),
        ({"do_sample": False, "min_p": 0.1}, None),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 0},
            Sampling(temperature=0.6, top_p=0.9),
        ),
        ({"do_sample": True, "top_k": 50, "top_p": None}, Sampling(top_k=50)),
    ],
)
def test_sampling_is_what_it_asks_for(
    model: Path, fields: dict[str, Any], sampling: Sampling | None
) -> None:
    _says(model, **fields)
    assert load_spec(model).sampling == sampling


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"eos_token_id": "x"}, "eos_token_id"),
        ({"eos_token_id": [1, 2.5]}, "eos_token_id"),
        ({"pad_token_id": -(2**40)}, "pad_token_id"),
        ({"do_sample": True, "temperature": 0}, "temperature"),
        ({"do_sample": True, "top_p": 2}, "top_p"),
        ({"do_sample": True, "top_k": -1}, "top_k"),
        ({"do_sample": True, "min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": [1.1]}, "repetition_penalty"),
    ],
)
def test_a_value_that_is_none_is_refused(model: Path, fields: dict[str, Any], named: str) -> None:
    _says(model, **fields)
    error = refusal(lambda: load_spec(model), named)
    assert FILE in error.where


def test_a_caller_has_the_last_word() -> None:
    sampling = Sampling(temperature=0.6, top_p=0.9)
    few = Sampling(temperature=0.6, min_p=0.2)
    assert asked(None, None, None, None) == (0.0, None, None, None)
    assert asked(None, None, 5, None) == (0.0, 5, None, None)
    assert asked(sampling, None, None, None) == (0.6, None, 0.9, None)
    assert asked(few, None, None, None) == (0.6, None, None, 0.2)
    assert asked(few, None, 5, None) == (0.6, 5, None, None)
    assert asked(sampling, None, 5, None) == (0.6, 5, None, None)
    assert asked(sampling, 0.0, None, None) == (0.0, None, None, None)
    assert asked(sampling, 1.5, None, 0.5) == (1.5, None, 0.5, None)


def test_min_p_keeps_what_transformers_keeps() -> None:
    logits = torch.randn(64, 40, generator=torch.Generator().manual_seed(0)) * 3
    kept = MinPLogitsWarper(0.05)(None, logits / 0.7).isfinite()
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        drawn = sample(logits, 0.7, generator=generator, min_p=0.05)
        assert kept.gather(1, drawn[:, None]).all()
    few = logits.double().softmax(-1).amax(-1) < 0.5  # several are likely there, and are drawn
    assert kept[few].sum(1).min() > 1


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    logits = torch.randn(4, 9, 30, generator=torch.Generator().manual_seed(0)) * 3
    prompts = [[1, 2, 2], [5], list(range(20))]
    rows = [list(each) for each in prompts]
    theirs, choose = RepetitionPenaltyLogitsProcessor(1.7), penalised(sample, 1.7, prompts)
    for step in logits.transpose(0, 1)[:, :3]:
        wanted = [
            int(theirs(torch.tensor([row]), each[None]).argmax())
            for row, each in zip(rows, step, strict=True)
        ]
        assert choose(step).tolist() == wanted
        for row, token in zip(rows, wanted, strict=True):
            row.append(token)


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"no_repeat_ngram_size": 3, "suppress_tokens": [4]}, "no_repeat_ngram_size, suppress_tok"),
        ({"sparkle_penalty": 1.5}, "sparkle_penalty"),
        ({"do_sample": True, "typical_p": 0.9, "num_beams": 4}, "num_beams, typical_p"),
        ({"num_beams": 1, "typical_p": 0.9, "max_length": 20, "suppress_tokens": []}, None),
        ({"encoder_repetition_penalty": 1.0, "min_length": 0, "repetition_penalty": 1.1}, None),
    ],
)
@pytest.mark.parametrize("file", [FILE, "config.json"])
def test_a_note_names_what_is_not_applied(
    file: str, model: Path, fields: dict[str, Any], named: str | None
) -> None:
    if file == FILE:
        _says(model, **fields)
    elif {"sparkle_penalty", "encoder_repetition_penalty"}.isdisjoint(fields):
        (model / FILE).unlink()
        put(file, "text_config", json.loads((model / file).read_text())["text_config"] | fields)(
            model
        )
    else:
        return  # unknown fields of config.json are refused
    notes = unapplied(load_spec(model).notes)
    assert len(notes) == (named is not None)
    if named:
        assert notes[0].startswith(f"{file}: ") and named in notes[0]


@pytest.mark.full
def test_artefacts_and_sessions_follow_it(model: Path, tmp_path: Path) -> None:
    ids = [[0, 321, 1200, 77]]
    _says(model, bos_token_id=0, eos_token_id=1, pad_token_id=5)
    plain = moec.open_session(model).generate(ids, max_new_tokens=12)[0].tolist()
    _says(model, eos_token_id=[plain[6]], pad_token_id=5)
    theirs = Llama4ForConditionalGeneration.from_pretrained(model, dtype=torch.float32).generate(
        torch.tensor(ids), max_new_tokens=12, do_sample=False
    )
    art = moec.export(model, out=tmp_path / "art")
    ours = moec.open_session(art.path).generate(ids, max_new_tokens=12)
    assert ours[0].tolist() == theirs[0].tolist() == plain[:7]

    penalty = {"eos_token_id": 1, "pad_token_id": 5, "repetition_penalty": 1.5, "min_length": 2}
    _says(model, **penalty)
    kind = Llama4ForConditionalGeneration
    theirs = kind.from_pretrained(model, dtype=torch.float32).generate(
        torch.tensor(ids), max_new_tokens=12
    )
    bound = moec.bind(moec.export("tiny-scout", out=tmp_path / "plain").path, model)
    assert "min_length" in unapplied(bound.manifest.spec.notes)[0]
    session = moec.open_session(bound.path)
    assert session.generate(ids, max_new_tokens=12)[0].tolist() == theirs[0].tolist() != plain
    once = session.generate(ids, max_new_tokens=12, repetition_penalty=1.0)
    assert once[0].tolist() == plain

    _says(model, eos_token_id=plain[6], do_sample=True, temperature=0.5, top_k=3)
    unbound = moec.export("tiny-scout", target="ort", out=tmp_path / "ort")
    bound = moec.bind(unbound.path, model)
    assert bound.manifest.spec.sampling == Sampling(temperature=0.5, top_k=3)
    config = json.loads((bound.path / "genai" / "genai_config.json").read_text())
    search = {key: config["search"].get(key) for key in ("do_sample", "temperature", "top_k")}
    assert search == {"do_sample": True, "temperature": 0.5, "top_k": 3}
    assert config["model"]["eos_token_id"] == [plain[6], 1]
    session = moec.open_session(bound.path)
    drawn = {tuple(session.generate(ids, max_new_tokens=3, seed=i)[0].tolist()) for i in range(9)}
    assert len(drawn) > 1, "it samples by default"
    greedy = session.generate(ids, max_new_tokens=3, temperature=0)[0].tolist()
    assert greedy == plain[:7]


@pytest.mark.full
@pytest.mark.parametrize("said", ["float32", None])
def test_the_dtype_is_that_of_the_weights(said: str | None, model: Path, tmp_path: Path) -> None:
    expected = moec.open_session(model).logits([[1, 2, 3]])
    file = model / "config.json"
    config = json.loads(file.read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        for key in ("torch_dtype", "dtype"):
            part.pop(key, None)
    file.write_text(json.dumps(config | ({"torch_dtype": said} if said else {})))
    art = moec.export(model, out=tmp_path / "art")
    assert art.manifest.spec.dtype == "bf16" and art.manifest.weights.mode == "in-place"
    assert (moec.open_session(model).logits([[1, 2, 3]]) == expected).all()
