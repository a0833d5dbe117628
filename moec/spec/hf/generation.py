"""Read `generation_config.json`: the tokens that end a sequence, and how to choose the next one."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from moec.spec.errors import refuse
from moec.spec.fields import read_own_json
from moec.spec.model import ModelSpec, Sampling, Tokens
from moec.spec.parts.sizes import Factor

_NEXT = "correct the field, or delete the file: config.json is enough"
#: what transformers takes where the file has no top_k; 0 means all tokens
_TOP_K = 50
#: how the note on fields begins that change the text, and that sessions leave aside
_NOT_APPLIED = "Generation does not apply "

#: fields that change the text, and the values with which they do not, beside those of `_NOTHING`
_NEUTRAL: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(
        "bad_words_ids begin_suppress_tokens constraints diversity_penalty dola_layers"
        " encoder_no_repeat_ngram_size exponential_decay_length_penalty force_words_ids"
        " forced_bos_token_id forced_decoder_ids forced_eos_token_id min_length min_new_tokens"
        " no_repeat_ngram_size penalty_alpha sequence_bias stop_strings"
        " suppress_tokens token_healing watermarking_config".split(),
        (),
    ),
    **dict.fromkeys(
        "encoder_repetition_penalty guidance_scale num_beams num_beam_groups"
        " num_return_sequences".split(),
        (1,),
    ),
}
#: the same for fields that change only what is drawn
_NEUTRAL_OF_DRAWS: dict[str, tuple[object, ...]] = {
    "epsilon_cutoff": (),
    "eta_cutoff": (),
    "top_h": (1,),
    "typical_p": (1,),
}
_NOTHING: tuple[object, ...] = (None, False, 0, [], {}, "")
#: fields that sessions apply, and fields that change no text, but at most its length
_READ = frozenset(
    """
    _commit_hash _from_model_config assistant_confidence_threshold assistant_early_exit
    assistant_ensemble_weight assistant_lookbehind attn_temperature_tuning bos_token_id
    cache_config cache_implementation
    chat_format compile_config continuous_batching_config decoder_start_token_id disable_compile
    do_sample early_stopping eos_token_id is_assistant length_penalty low_memory max_cache_len
    max_length max_matching_ngram_size max_new_tokens max_time max_window_size min_p
    num_assistant_tokens num_assistant_tokens_schedule output_attentions output_hidden_states
    output_logits output_scores pad_token_id prefill_chunk_size prompt_lookup_num_tokens
    remove_invalid_values renormalize_logits repetition_penalty return_dict_in_generate
    speculation_type target_lookbehind temperature top_k top_p trace transformers_version use_cache
    use_mtp
    """.split()
)


def with_generation(spec: ModelSpec, path: Path, config: Mapping[str, Any]) -> ModelSpec:
    """`spec` with what the file `path` says of generation, or `config` if there is no such file.

    `config` is what config.json holds. End tokens of the file come before those of config.json,
    which still end a sequence. Where neither names any, there are none, whatever transformers'
    class of the config has by default. `do_sample` false or absent means greedy, whatever the other
    fields say, as in transformers. A note names the fields that sessions do not apply.

    Raises:
        MoecError: the file cannot be read, or a field holds no such value.
    """
    if path.is_file():
        raw = read_own_json(path)
        tokens = _tokens(raw, spec)
    else:
        raw, tokens = of_config(config), spec.tokens.model_dump()
        path = path.with_name("config.json")
    try:
        return spec.model_copy(
            update={
                "tokens": Tokens.model_validate(tokens, strict=False),
                "sampling": _sampling(raw),
                "repetition_penalty": _Greedy.model_validate(raw).repetition_penalty or 1.0,
                "notes": (*spec.notes, *_notes(raw, path.name)),
            }
        )
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        refuse(f"{path}: {_FIELDS.get(field.split('.')[0], field)}", first["msg"], "a value", _NEXT)


def generates_as(spec: ModelSpec, source: ModelSpec) -> ModelSpec:
    """`spec`, which generates as the checkpoint of the same model `source` asks for."""
    notes = dict.fromkeys((*spec.notes, *unapplied(source.notes)))
    fields = ("tokens", "sampling", "repetition_penalty")
    own = {name: getattr(source, name) for name in fields}
    return spec.model_copy(update={**own, "notes": tuple(notes)})


def unapplied(notes: Iterable[str]) -> list[str]:
    """Those of a spec's notes that say which settings of generation are not applied."""
    return [note for note in notes if _NOT_APPLIED in note]


class _Greedy(BaseModel):
    """The field that counts without `do_sample` too."""

    repetition_penalty: Factor | None = None


#: fields of ours, and their names in the file
_FIELDS = {"eos": "eos_token_id", "bos": "bos_token_id", "pad": "pad_token_id"}


def of_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of generation in config.json, where old files have them; outer ones come first."""
    inner = config.get("text_config")
    found = dict[str, Any]()
    for part in (inner if isinstance(inner, dict) else {}, config):
        found |= {key: each for key, each in part.items() if each is not None}
    known = {"do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"}
    known |= {*_NEUTRAL, *_NEUTRAL_OF_DRAWS}
    return {key: each for key, each in found.items() if key in known}


def _tokens(raw: dict[str, Any], spec: ModelSpec) -> dict[str, Any]:
    named = raw.get("eos_token_id")
    named = named if isinstance(named, list) else [] if named is None else [named]
    tokens = {
        "eos": tuple(dict.fromkeys([*named, *spec.tokens.eos])) if _ids(named) else named,
        "bos": raw.get("bos_token_id", spec.tokens.bos),
        "pad": raw.get("pad_token_id", spec.tokens.pad),
    }
    return spec.tokens.model_dump() | {k: each for k, each in tokens.items() if each is not None}


def _ids(values: list[Any]) -> bool:
    return all(type(each) is int for each in values)


def _sampling(raw: dict[str, Any]) -> Sampling | None:
    if not raw.get("do_sample"):
        return None
    values = {key: raw.get(key) for key in ("temperature", "top_k", "top_p", "min_p")}
    given = {"top_k": _TOP_K} | {key: each for key, each in values.items() if each is not None}
    if given["top_k"] == 0:
        del given["top_k"]
    return Sampling.model_validate(given)


def _notes(raw: dict[str, Any], name: str) -> tuple[str, ...]:
    """A note on the fields that change the text, and that sessions do not apply."""
    neutral = _NEUTRAL | _NEUTRAL_OF_DRAWS
    aside = _READ if raw.get("do_sample") else _READ | {*_NEUTRAL_OF_DRAWS}
    found = sorted(
        key
        for key, value in raw.items()
        if key not in aside and value not in (*_NOTHING, *neutral.get(key, ()))
    )
    return (f"{name}: {_NOT_APPLIED}{', '.join(found)[:200]}.",) if found else ()
