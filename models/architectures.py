"""The architectures that are served: one line each, by the model type of config.json. Free of torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from models.families import ernie, exaone, experts, gemma, glm, gpt_oss, granite, ministral, olmo, phi, plain, smollm
from models.files.json_values import Json, ModelError, short
from models.files.rope_config import RopeConfig
from models.model_config import ModelConfig

_PLAIN_ROPE = RopeConfig()


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """An architecture, and the values that transformers gives to absent keys.

    name: of the class in transformers. aliases: other names of it. kv_heads, head_dim: None: as many as heads;
    hidden_size by heads. original_positions: original_max_position_embeddings beside the parameters of the rotary
    embedding, which counts more than one among them; None: there is none. rope: what rotates, and with which theta.
    complete: sets, in a config with all common keys, what is special to the architecture. reads: keys that change the
    arithmetic of other models or of parts (models.files.foreign_keys), and that `complete` or this class takes care of.
    layer_keys: keys that tell layers apart.
    """

    name: str
    aliases: tuple[str, ...] = ()
    complete: Callable[[Json, ModelConfig], ModelConfig]
    max_positions: int
    original_positions: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    ties_embeddings: bool = False
    rope: RopeConfig = _PLAIN_ROPE
    reads: frozenset[str] = frozenset()
    layer_keys: tuple[str, ...] = ("layer_types",)


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(
        name="LlamaForCausalLM", aliases=("LLaMAForCausalLM",), complete=plain.llama, max_positions=2048
    ),
    "mistral": Architecture(name="MistralForCausalLM", complete=plain.mistral, max_positions=131072, kv_heads=8),
    "ministral": Architecture(name="MinistralForCausalLM", complete=plain.mistral, max_positions=131072, kv_heads=8),
    "qwen2": Architecture(name="Qwen2ForCausalLM", complete=plain.qwen2, max_positions=32768, kv_heads=32),
    "qwen3": Architecture(
        name="Qwen3ForCausalLM", complete=plain.qwen3, max_positions=32768, kv_heads=32, head_dim=128
    ),
    "seed_oss": Architecture(
        name="SeedOssForCausalLM", complete=plain.seed_oss, max_positions=524288, kv_heads=8, head_dim=128
    ),
    "internlm3": Architecture(
        name="InternLM3ForCausalLM",
        aliases=("LlamaForCausalLM",),  # transformers saves it as one
        complete=plain.internlm3,
        max_positions=32768,
        kv_heads=2,
        head_dim=128,
        rms_norm_eps=1e-5,
    ),
    "phi3": Architecture(
        name="Phi3ForCausalLM", complete=phi.phi3, max_positions=4096, original_positions=4096, rms_norm_eps=1e-5
    ),
    "glm": Architecture(
        name="GlmForCausalLM",
        complete=glm.glm,
        max_positions=131072,
        kv_heads=2,
        head_dim=128,
        rms_norm_eps=1.5625e-7,
    ),
    "glm4": Architecture(
        name="Glm4ForCausalLM",
        complete=glm.glm4,
        max_positions=131072,
        kv_heads=2,
        head_dim=128,
        rms_norm_eps=1.5625e-7,
    ),
    "ministral3": Architecture(
        name="Ministral3ForCausalLM",
        complete=ministral.ministral3,
        max_positions=262144,
        kv_heads=8,
        head_dim=128,
        rms_norm_eps=1e-5,
    ),
    "granite": Architecture(
        name="GraniteForCausalLM", complete=granite.granite, max_positions=2048, reads=granite.MULTIPLIERS
    ),
    "ernie4_5": Architecture(
        name="Ernie4_5ForCausalLM",
        aliases=("Ernie4_5_ForCausalLM",),
        complete=ernie.ernie4_5,
        max_positions=131072,
        kv_heads=2,
        head_dim=128,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=500000.0),
        ties_embeddings=True,
    ),
    "exaone4": Architecture(
        name="Exaone4ForCausalLM", complete=exaone.exaone4, max_positions=2048, kv_heads=32, rms_norm_eps=1e-5
    ),
    "gemma3_text": Architecture(
        name="Gemma3ForCausalLM",
        complete=gemma.gemma3_text,
        max_positions=131072,
        kv_heads=4,
        head_dim=256,
        rope=RopeConfig(theta=1e6),
        ties_embeddings=True,
        reads=gemma.READS,
    ),
    "olmo2": Architecture(name="Olmo2ForCausalLM", complete=olmo.olmo2, max_positions=2048, rms_norm_eps=1e-5),
    "olmo3": Architecture(
        name="Olmo3ForCausalLM",
        complete=olmo.olmo3,
        max_positions=2048,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=500000.0),
    ),
    "smollm3": Architecture(
        name="SmolLM3ForCausalLM",
        complete=smollm.smollm3,
        max_positions=32768,
        kv_heads=4,
        rope=RopeConfig(theta=2e6),
        ties_embeddings=True,
        reads=smollm.READS,
        layer_keys=("layer_types", "no_rope_layers"),
    ),
    "mixtral": Architecture(
        name="MixtralForCausalLM",
        complete=experts.mixtral,
        max_positions=131072,
        kv_heads=8,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=1e6),
        reads=experts.COUNTS,
    ),
    "qwen2_moe": Architecture(
        name="Qwen2MoeForCausalLM",
        complete=experts.qwen2_moe,
        max_positions=32768,
        kv_heads=16,
        reads=experts.COUNTS,
        layer_keys=("layer_types", *experts.DENSE_LAYERS),
    ),
    "qwen3_moe": Architecture(
        name="Qwen3MoeForCausalLM",
        complete=experts.qwen3_moe,
        max_positions=32768,
        kv_heads=4,
        reads=experts.COUNTS,
        layer_keys=("layer_types", *experts.DENSE_LAYERS),
    ),
    "olmoe": Architecture(
        name="OlmoeForCausalLM",
        complete=experts.olmoe,
        max_positions=4096,
        rms_norm_eps=1e-5,
        reads=experts.COUNTS,
    ),
    "gpt_oss": Architecture(
        name="GptOssForCausalLM",
        complete=gpt_oss.gpt_oss,
        max_positions=131072,
        kv_heads=8,
        head_dim=64,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=150000.0),
        reads=gpt_oss.READS,
    ),
}

_LATENT, _STATE, _LINEAR = "multi-head latent attention", "state-space layers", "linear attention"
_LAYER_NORMS, _CAPPED, _CROSS = "layer norms with a mean", "logit softcapping", "cross-attention layers"
_SIGMOIDS = "experts chosen by sigmoids"

MISSING: Mapping[str, str] = {
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "kimi_k25", "kimi_vl"), _LATENT),
    **dict.fromkeys(("glm4_moe_lite", "glm_moe_dsa", "longcat_flash", "minicpm3", "mistral4"), _LATENT),
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "jamba", "falcon_h1", "nemotron_h", "bamba"), _STATE),
    **dict.fromkeys(("granitemoehybrid", "zamba", "zamba2"), _STATE),
    **dict.fromkeys(
        ("qwen3_next", "qwen3_5", "qwen3_5_moe", "minimax", "minimax_m1", "kimi_linear", "olmo_hybrid"), _LINEAR
    ),
    **dict.fromkeys(("bailing_hybrid", "recurrent_gemma", "rwkv", "xlstm"), _LINEAR),
    **dict.fromkeys(("lfm2", "lfm2_moe", "lfm2_vl"), "convolution layers"),
    **dict.fromkeys(("llama4", "llama4_text"), "chunked attention"),
    **dict.fromkeys(("gemma2", "nanochat", "vaultgemma"), _CAPPED),
    **dict.fromkeys(("gemma3n", "gemma3n_text", "gemma4", "gemma4_text"), "embeddings per layer and shared KV"),
    **dict.fromkeys(("cohere", "cohere2", "dbrx", "nemotron", "olmo", "persimmon", "phi", "phimoe"), _LAYER_NORMS),
    **dict.fromkeys(("gpt2", "gpt_bigcode", "gpt_neox", "gptj", "opt", "stablelm", "starcoder2"), _LAYER_NORMS),
    **dict.fromkeys(("bloom", "falcon", "mpt"), f"{_LAYER_NORMS}, and ALiBi or parallel attention"),
    **dict.fromkeys(
        ("afmoe", "dots1", "glm4_moe", "glm4v_moe", "mimo_v2_flash", "minimax_m2", "solar_open"), _SIGMOIDS
    ),
    **dict.fromkeys(("bailing_moe_v2", "exaone_moe", "nemotron_h_moe"), _SIGMOIDS),
    **dict.fromkeys(("ernie4_5_moe", "ernie4_5_vl_moe"), "a correction of the scores that choose experts"),
    **dict.fromkeys(("granitemoe", "granitemoeshared", "jetmoe", "qwen3_vl_moe"), "experts stacked in its own layout"),
    "apertus": "the activation xIELU",
    "arcee": "an MLP without a gate",
    **dict.fromkeys(("baichuan", "chatglm", "internlm2", "qwen"), "joined projections in its own layout"),
    **dict.fromkeys(("deci", "nemotron-nas", "openelm"), "layers of different shapes"),
    "diffllama": "differential attention",
    **dict.fromkeys(("mllama", "mllama_text_model"), _CROSS),
    **dict.fromkeys(("bart", "t5", "t5gemma", "whisper"), "an encoder"),
    **dict.fromkeys(("bert", "modernbert", "roberta"), "bidirectional attention, which continues no text"),
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe"), "norms of queries and keys after they are rotated"),
}
"""What architectures that are not served would need, by model type."""


def find_architecture(data: Json) -> Architecture:
    """Return the architecture that the content of config.json names. Raises ModelError, which says what is missing."""
    model_type = data.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        if isinstance(model_type, str) and model_type in MISSING:
            raise ModelError(f"model_type {short(model_type)} is not supported: it needs {MISSING[model_type]}")
        raise ModelError(f"model_type {short(model_type)} is not supported; these are: {', '.join(ARCHITECTURES)}")
    architecture, names = ARCHITECTURES[model_type], data.get("architectures")
    if names not in (None, [], [architecture.name], *([alias] for alias in architecture.aliases)):
        raise ModelError(f"architectures {short(names)} is not supported for model_type {model_type!r}")
    return architecture
