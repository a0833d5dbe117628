"""The models that Llama 4 is compared with. The source is the released `config.json` files.

DeepSeek-MoE-145B was described and never released. Aria is its decoder, without the vision tower.
"""

from moec.spec.model import ModelSpec, TextSpec, Tokens
from moec.spec.parts.attention import Latent
from moec.spec.parts.rope import Yarn
from moec.spec.parts.routing import Experts, Routing

_SOFTMAX = Routing(score="softmax", choice="scores", weighed="output")
_NORMALISED = _SOFTMAX.model_copy(update={"normalise": True})


def _row(
    name: str,
    architecture: str,
    text: TextSpec,
    eos: int,
    bos: int | None = None,
    provenance: str = "released",
    notes: tuple[str, ...] = (),
) -> ModelSpec:
    return ModelSpec.model_validate(
        {
            "name": name,
            "provenance": provenance,
            "notes": notes,
            "dtype": "bf16",
            "separate_experts": architecture != "aria_text",
            "architecture": architecture,
            "tokens": Tokens(bos=bos, eos=(eos,)),
            "text": text,
        }
    )


def _text(layers: int, dim: int, heads: int, kv_heads: int, vocab: int, **more: object) -> TextSpec:
    """A decoder that attends to all positions, with RoPE on halves, and without QK-norm."""
    return TextSpec.model_validate(
        {
            "layers": layers,
            "dim": dim,
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": 128,
            "vocab": vocab,
            "attention": "G",
            "rope": "R",
            "qk_norm": "-",
            "temperature": "-",
            "ffn": "M",
            "rope_pairs": "halves",
            "rope_scaling": None,
        }
        | more
    )


ROWS = (
    _row(
        "olmoe-1b-7b",
        "olmoe",
        _text(
            *(16, 2048, 16, 16, 50304),
            max_positions=4096,
            norm_eps=1e-5,
            rope_theta=10_000.0,
            qk_norm="W",
            experts=Experts(count=64, top_k=8, hidden=1024, routing=_SOFTMAX),
        ),
        eos=50279,
    ),
    _row(
        "qwen3-30b-a3b",
        "qwen3_moe",
        _text(
            *(48, 2048, 32, 4, 151936),
            max_positions=40960,
            norm_eps=1e-6,
            rope_theta=1_000_000.0,
            qk_norm="H",
            experts=Experts(count=128, top_k=8, hidden=768, routing=_NORMALISED),
            dense_hidden=6144,
        ),
        bos=151643,
        eos=151645,
    ),
    _row(
        "mixtral-8x7b",
        "mixtral",
        _text(
            *(32, 4096, 32, 8, 32000),
            max_positions=32768,
            norm_eps=1e-5,
            rope_theta=1_000_000.0,
            experts=Experts(count=8, top_k=2, hidden=14336, routing=_NORMALISED),
        ),
        bos=1,
        eos=2,
    ),
    _row(
        "deepseek-moe-16b",
        "deepseek_moe",
        _text(
            *(28, 2048, 16, 16, 102400),
            max_positions=4096,
            norm_eps=1e-6,
            rope_theta=10_000.0,
            ffn="D" + "M" * 27,
            dense_hidden=10944,
            experts=Experts(
                count=64, top_k=6, hidden=1408, shared_hidden=2 * 1408, routing=_SOFTMAX
            ),
        ),
        bos=100000,
        eos=100001,
    ),
    _row(
        "deepseek-moe-145b",
        "deepseek_moe",
        _text(
            *(62, 4096, 32, 32, 102400),
            max_positions=4096,
            norm_eps=1e-6,
            rope_theta=10_000.0,
            ffn="D" + "M" * 61,
            dense_hidden=8 * 1408,
            experts=Experts(
                count=128, top_k=12, hidden=1408, shared_hidden=4 * 1408, routing=_SOFTMAX
            ),
        ),
        bos=100000,
        eos=100001,
        provenance="estimated",
        notes=(
            "HYPOTHETICAL: DeepSeek-MoE-145B was never released, and no config is public.",
            "Public: 62 layers, width 4096, 128 routed experts of which 12, 4 shared, layer 0 "
            "dense, 144.6 B parameters, 22.2 B of them active.",
            "Guessed: all other fields; the width of an expert was chosen to land near these.",
        ),
    ),
    _row(
        "deepseek-v3",
        "deepseek_v3",
        _text(
            *(61, 7168, 128, 128, 129280),
            head_dim=192,
            max_positions=163840,
            norm_eps=1e-6,
            rope_theta=10_000.0,
            rope_pairs="adjacent",
            rope_scaling=Yarn(
                factor=40.0,
                original_positions=4096,
                mscale=1.0,
                mscale_all_dim=1.0,
                scales_scores=True,
            ),
            latent=Latent(q_rank=1536, kv_rank=512, nope=128, rope=64, value=128),
            ffn="DDD" + "M" * 58,
            mtp="aside",
            dense_hidden=18432,
            experts=Experts(
                count=256,
                top_k=8,
                hidden=2048,
                shared_hidden=2048,
                routing=Routing(
                    choice="scores",
                    bias=True,
                    groups=8,
                    kept_groups=4,
                    normalise=True,
                    factor=2.5,
                    weighed="output",
                ),
            ),
        ),
        bos=0,
        eos=1,
        notes=("A build without the layer of multi-token prediction has 11.6 B parameters less.",),
    ),
    _row(
        "aria",
        "aria_text",
        _text(
            *(28, 2560, 20, 20, 100352),
            max_positions=65536,
            norm_eps=1e-6,
            rope_theta=5_000_000.0,
            experts=Experts(
                count=64,
                top_k=6,
                hidden=1664,
                shared_hidden=2 * 1664,
                routing=Routing(score="softmax_of_chosen", weighed="output"),
            ),
        ),
        bos=1,
        eos=2,
        notes=("The decoder alone, without the vision tower.",),
    ),
)
