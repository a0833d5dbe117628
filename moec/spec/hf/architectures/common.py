"""What the readers of all architectures share: fields without effect, RoPE, types, tokens."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, get_args

from moec.spec.data import DType, dtypes
from moec.spec.fields import Fields, shown
from moec.spec.model import ModelSpec, TextSpec, Tokens
from moec.spec.parts.rope import RopeScaling, Scaling, Yarn
from moec.spec.parts.vision import VisionSpec

#: Fields for training, bookkeeping and generation, which do not change what the model computes.
INERT = frozenset(
    """
    _attn_implementation_autoset _name_or_path add_cross_attention architectures attention_dropout
    attn_implementation auto_map bad_words_ids begin_suppress_tokens cache_implementation
    chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty
    do_sample early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty
    finetuning_task for_llm_compressor forced_bos_token_id forced_eos_token_id id2label
    initializer_range is_decoder is_encoder_decoder label2id length_penalty max_length min_length
    no_repeat_ngram_size norm_eps num_beam_groups num_beams num_return_sequences
    output_attentions output_hidden_states output_router_logits output_scores prefix problem_type
    projector_dropout pruned_heads remove_invalid_values repetition_penalty return_dict
    return_dict_in_generate router_aux_loss_coef router_jitter_noise sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p
    torchscript transformers_version typical_p use_bfloat16 use_cache
    """.split()
)


#: The values of `torch_dtype` (4.x) or `dtype` (5.x), and our names for them.
DTYPES: dict[str, DType] = {
    dtypes("name", "torch")[name]: name for name in reversed(get_args(DType))
}


class Read(NamedTuple):
    """What the reader of an architecture makes of a `config.json`."""

    text: TextSpec
    tokens: Tokens
    dtype: DType
    vision: VisionSpec | None = None
    notes: tuple[str, ...] = ()


class Architecture(NamedTuple):
    """How checkpoints of one architecture say what they are.

    Attributes:
        types: the values of `model_type` in `config.json`.
        read: reads the fields of `config.json`, which has one of these types.
        write: the `config.json` of a spec; `read` reads an equal spec back.
        keys: our names of tensors, and the keys of a checkpoint. `{i}` stands for the index of a
            layer and `{e}` for that of an expert.
        aside: a pattern of keys that a checkpoint may have beside these, which no graph uses.
        left_out: fields of `config.json` of a checkpoint that lacks what lies aside.
        separate_experts: whether each routed expert has tensors of its own in a checkpoint.
        reads_apart: whether other engines read its experts one by one.
        generation: what generation_config.json must say of a spec, for engines that look there.
    """

    types: tuple[str, ...]
    read: Callable[[Fields, str], Read]
    write: Callable[[ModelSpec], dict[str, Any]]
    keys: Mapping[str, str]
    aside: Callable[[TextSpec], str] = lambda _: ""
    left_out: Mapping[str, Any] = MappingProxyType({})
    separate_experts: bool = True
    reads_apart: bool = True
    generation: Callable[[ModelSpec], dict[str, Any]] = lambda _: {}


def inert(at: Fields) -> frozenset[str]:
    """`INERT`, and what fine-tuners write for themselves."""
    return INERT | {key for key in at.left if _is_bookkeeping(key)}


def _is_bookkeeping(key: str) -> bool:
    return key.startswith("unsloth_") or key == "model_name"


def bookkeeping(raw: dict[str, Any]) -> tuple[str, ...]:
    """A note on the fields of fine-tuners, at the top and one level below."""
    inner = (each for each in raw.values() if isinstance(each, dict))
    keys = sorted({key for each in (raw, *inner) for key in each if _is_bookkeeping(key)})
    return (f"config.json: left aside {', '.join(keys)[:200]}.",) if keys else ()


def rope(at: Fields, *kinds: str) -> tuple[float, Scaling | None]:
    """Read RoPE's base and scaling.

    They are in `rope_theta` and `rope_scaling`, or in `rope_parameters` in the 5.x style. A
    `rope_scaling` that says anything counts instead of `rope_parameters`, as in transformers: it
    is what a user adds to a config to reach longer contexts.

    Raises:
        MoecError: no field that counts says the base, or the kind of scaling is none of `kinds`.
    """
    scaling = at.take("rope_scaling", dict, default=None) or None
    parameters = at.take("rope_parameters", dict, default=None)
    base = at.take("rope_theta", float, default=None)
    name = "rope_scaling" if scaling or parameters is None else "rope_parameters"
    inner = Fields(f"{at.where}.{name}", scaling or parameters or {"rope_type": "default"})
    theta = inner.take("rope_theta", float, default=base)
    if theta is None and scaling and parameters is not None:
        # transformers takes the default of the class here, whatever rope_parameters says.
        expected = "float, beside rope_scaling or in it, because rope_parameters does not count"
        raise at.error("rope_theta", "no such field", expected)
    if theta is None:
        raise (inner if parameters is not None else at).error(
            "rope_theta", "no such field", "float"
        )
    kind = inner.take("rope_type", str, default=inner.left.get("type"))  # before 4.43: type
    if kind not in kinds:
        raise inner.error("rope_type", repr(kind), " or ".join(map(repr, kinds)))
    result: Scaling | None = None
    if kind == "yarn":
        result = Yarn(
            factor=inner.take("factor", float),
            original_positions=inner.take("original_max_position_embeddings", int),
            fast=inner.take("beta_fast", float, default=32.0),
            slow=inner.take("beta_slow", float, default=1.0),
            truncate=inner.take("truncate", bool, default=True),
            mscale=inner.take("mscale", float, default=None) or None,
            mscale_all_dim=inner.take("mscale_all_dim", float, default=None) or None,
            attention_factor=inner.take("attention_factor", float, default=None),
        )
    if kind == "llama3":
        result = RopeScaling(
            factor=inner.take("factor", float),
            low=inner.take("low_freq_factor", float),
            high=inner.take("high_freq_factor", float),
            original_positions=inner.take("original_max_position_embeddings", int),
        )
    inner.finish({"type"})
    return float(theta), result


def written_scaling(of: Scaling) -> dict[str, Any]:
    """The field `rope_scaling`, which `rope` reads."""
    if not isinstance(of, Yarn):
        return {
            "factor": of.factor,
            "high_freq_factor": of.high,
            "low_freq_factor": of.low,
            "original_max_position_embeddings": of.original_positions,
            "rope_type": "llama3",
        }
    return {
        "rope_type": "yarn",
        "factor": of.factor,
        "original_max_position_embeddings": of.original_positions,
        "beta_fast": of.fast,
        "beta_slow": of.slow,
        "truncate": of.truncate,
        "mscale": of.mscale,
        "mscale_all_dim": of.mscale_all_dim,
        "attention_factor": of.attention_factor,
    }


def dtype_of(top: Fields, text: Fields) -> DType:
    """The type that the config names, or bf16; the weights' own headers have the last word."""
    found = [
        value
        for fields in (top, text)
        for key in ("torch_dtype", "dtype")
        if (value := fields.take(key, str, default=None)) is not None
    ]
    if not found:
        return "bf16"
    if len(set(found)) > 1 or found[0] not in DTYPES:
        raise top.error("torch_dtype", shown(found), f"one of {', '.join(DTYPES)}")
    return DTYPES[found[0]]


def tokens_of(top: Fields, text: dict[str, Any], images: bool = False) -> Tokens:
    """The ids of special tokens. `text` has the fields of the decoder, `top` those of images.

    Images take transformers' defaults for the tokens around them.
    """
    eos = text.get("eos_token_id")
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = text.get(key)
        for token in ids if isinstance(ids, list) else [ids]:
            if token is not None and type(token) is not int:
                raise top.error(key, repr(token), "a token id")
    return Tokens(
        bos=text.get("bos_token_id"),
        eos=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        pad=text.get("pad_token_id"),
        image=top.take("image_token_index", int) if images else None,
        image_start=top.take("boi_token_index", int, default=200080) if images else None,
        image_end=top.take("eoi_token_index", int, default=200081) if images else None,
    )
