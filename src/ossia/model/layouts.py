"""The table of names: which tensors each layout of a checkpoint holds, and how they become the arrays of a layer.

    "hf"        Hugging Face, experts in MXFP4: [E, 2F, D/32, 16] blocks, [E, 2F, D/32] scales
    "hf-bf16"   Hugging Face, experts in bfloat16 (or float16, float32), transposed against MXFP4: [E, D, 2F], [E, F, D]
    "original"  the original/ folder: other names; q, k and v are the rows of one matrix; experts as in "hf"
    "gguf"      llama.cpp's files: gate and up are two tensors, or the halves of one; dense matrices may be quantised
    "ollama"    Ollama's own GGUF files: names of their own; q, k and v may be the rows of one matrix

In the first three, and in "ollama" where they are one tensor, the rows of gate and up alternate, gate first. Everything
here is a view: no layout costs a copy, but for GGUF's matrices of fewer than 8 bits.

Sources: model.safetensors.index.json of openai/gpt-oss-20b; `gpt_oss/torch/weights.py` of openai/gpt-oss for original/;
GptOssForCausalLM in llama.cpp's conversion to GGUF; `convert_gptoss.go` and the gptoss model of ollama/ollama.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple, Protocol

from ossia.errors import CheckpointError
from ossia.model.config import ModelConfig
from ossia.model.gguf_file import QUANTISED_NAMES
from ossia.ops import Array, ExpertArrays, Mxfp4

LayoutName = Literal["hf", "hf-bf16", "original", "gguf", "ollama"]
Get = Callable[[str], Array]
"""From a tensor's name to its values as a view of the mapped file."""

FLOATS = ("BF16", "F16", "F32")
BYTES = ("U8",)
FLOATS_OR_QUANTISED = (*FLOATS, "Q8_0", *sorted(QUANTISED_NAMES))
MXFP4_OR_FLOATS = ("MXFP4", *FLOATS)


class Expected(NamedTuple):
    """What a tensor must be."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...] = FLOATS


class Dense(NamedTuple):
    weight_OI: Array
    bias_O: Array


class LayerArrays(NamedTuple):
    """One layer as a checkpoint holds it, whatever its layout."""

    attention_norm_D: Array
    q: Dense
    k: Dense
    v: Dense
    o: Dense
    sinks_Q: Array
    moe_norm_D: Array
    router: Dense
    experts: ExpertArrays


class ModelArrays(NamedTuple):
    """What stands before and after the layers."""

    embedding_VD: Array
    final_norm_D: Array
    unembedding_VD: Array


class Layout(Protocol):
    """One way to lay out a model in files."""

    name: LayoutName

    def layer_prefix(self, layer: int) -> str:
        """What the names of a layer's tensors begin with."""

    def expected(self, config: ModelConfig) -> dict[str, Expected]:
        """Every tensor that a checkpoint of this shape holds, in the order of use."""

    def outer(self, get: Get) -> ModelArrays:
        """The arrays outside the layers."""

    def layer(self, get: Get, config: ModelConfig, layer: int) -> LayerArrays:
        """The arrays of one layer."""


class HuggingFace:
    """Layouts "hf" and "hf-bf16"."""

    def __init__(self, *, mxfp4: bool) -> None:
        self.mxfp4 = mxfp4
        self.name: LayoutName = "hf" if mxfp4 else "hf-bf16"

    def layer_prefix(self, layer: int) -> str:
        return f"model.layers.{layer}."

    def expected(self, config: ModelConfig) -> dict[str, Expected]:
        D, F, V, E = config.hidden_size, config.intermediate_size, config.vocab_size, config.num_experts
        q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        tensors = {"model.embed_tokens.weight": Expected((V, D))}
        for i in range(config.num_layers):
            layer = {
                "input_layernorm.weight": Expected((D,)),
                "self_attn.q_proj.weight": Expected((q_rows, D)),
                "self_attn.q_proj.bias": Expected((q_rows,)),
                "self_attn.k_proj.weight": Expected((kv_rows, D)),
                "self_attn.k_proj.bias": Expected((kv_rows,)),
                "self_attn.v_proj.weight": Expected((kv_rows, D)),
                "self_attn.v_proj.bias": Expected((kv_rows,)),
                "self_attn.o_proj.weight": Expected((D, q_rows)),
                "self_attn.o_proj.bias": Expected((D,)),
                "self_attn.sinks": Expected((config.num_heads,)),
                "post_attention_layernorm.weight": Expected((D,)),
                "mlp.router.weight": Expected((E, D)),
                "mlp.router.bias": Expected((E,)),
                "mlp.experts.gate_up_proj_bias": Expected((E, 2 * F)),
                "mlp.experts.down_proj_bias": Expected((E, D)),
            }
            if self.mxfp4:
                layer |= _mxfp4("mlp.experts.gate_up_proj_", (E, 2 * F, D))
                layer |= _mxfp4("mlp.experts.down_proj_", (E, D, F))
            else:
                layer["mlp.experts.gate_up_proj"] = Expected((E, D, 2 * F))
                layer["mlp.experts.down_proj"] = Expected((E, F, D))
            tensors |= {self.layer_prefix(i) + name: expected for name, expected in layer.items()}
        tensors["model.norm.weight"] = Expected((D,))
        tensors["lm_head.weight"] = Expected((V, D))
        return tensors

    def outer(self, get: Get) -> ModelArrays:
        return ModelArrays(get("model.embed_tokens.weight"), get("model.norm.weight"), get("lm_head.weight"))

    def layer(self, get: Get, config: ModelConfig, layer: int) -> LayerArrays:
        prefix = self.layer_prefix(layer)

        def dense(name: str) -> Dense:
            return Dense(get(f"{prefix}{name}.weight"), get(f"{prefix}{name}.bias"))

        def matrices(name: str) -> Mxfp4 | Array:
            if self.mxfp4:
                return Mxfp4(get(f"{prefix}mlp.experts.{name}_blocks"), get(f"{prefix}mlp.experts.{name}_scales"))
            return get(f"{prefix}mlp.experts.{name}").swapaxes(1, 2)

        return LayerArrays(
            attention_norm_D=get(prefix + "input_layernorm.weight"),
            q=dense("self_attn.q_proj"),
            k=dense("self_attn.k_proj"),
            v=dense("self_attn.v_proj"),
            o=dense("self_attn.o_proj"),
            sinks_Q=get(prefix + "self_attn.sinks"),
            moe_norm_D=get(prefix + "post_attention_layernorm.weight"),
            router=dense("mlp.router"),
            experts=_alternating_experts(
                matrices("gate_up_proj"),
                get(prefix + "mlp.experts.gate_up_proj_bias"),
                matrices("down_proj"),
                get(prefix + "mlp.experts.down_proj_bias"),
            ),
        )


class Original:
    """Layout "original"."""

    name: LayoutName = "original"

    def layer_prefix(self, layer: int) -> str:
        return f"block.{layer}."

    def expected(self, config: ModelConfig) -> dict[str, Expected]:
        D, F, V, E = config.hidden_size, config.intermediate_size, config.vocab_size, config.num_experts
        q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        tensors = {"embedding.weight": Expected((V, D))}
        for i in range(config.num_layers):
            layer = {
                "attn.norm.scale": Expected((D,)),
                "attn.qkv.weight": Expected((q_rows + 2 * kv_rows, D)),
                "attn.qkv.bias": Expected((q_rows + 2 * kv_rows,)),
                "attn.out.weight": Expected((D, q_rows)),
                "attn.out.bias": Expected((D,)),
                "attn.sinks": Expected((config.num_heads,)),
                "mlp.norm.scale": Expected((D,)),
                "mlp.gate.weight": Expected((E, D)),
                "mlp.gate.bias": Expected((E,)),
                "mlp.mlp1_bias": Expected((E, 2 * F)),
                "mlp.mlp2_bias": Expected((E, D)),
                **_mxfp4("mlp.mlp1_weight.", (E, 2 * F, D)),
                **_mxfp4("mlp.mlp2_weight.", (E, D, F)),
            }
            tensors |= {self.layer_prefix(i) + name: expected for name, expected in layer.items()}
        tensors["norm.scale"] = Expected((D,))
        tensors["unembedding.weight"] = Expected((V, D))
        return tensors

    def outer(self, get: Get) -> ModelArrays:
        return ModelArrays(get("embedding.weight"), get("norm.scale"), get("unembedding.weight"))

    def layer(self, get: Get, config: ModelConfig, layer: int) -> LayerArrays:
        prefix = self.layer_prefix(layer)

        def dense(name: str) -> Dense:
            return Dense(get(f"{prefix}{name}.weight"), get(f"{prefix}{name}.bias"))

        def matrices(name: str) -> Mxfp4:
            return Mxfp4(get(f"{prefix}mlp.{name}.blocks"), get(f"{prefix}mlp.{name}.scales"))

        q, k, v = _split_qkv(dense("attn.qkv"), config)
        return LayerArrays(
            attention_norm_D=get(prefix + "attn.norm.scale"),
            q=q,
            k=k,
            v=v,
            o=dense("attn.out"),
            sinks_Q=get(prefix + "attn.sinks"),
            moe_norm_D=get(prefix + "mlp.norm.scale"),
            router=dense("mlp.gate"),
            experts=_alternating_experts(
                matrices("mlp1_weight"),
                get(prefix + "mlp.mlp1_bias"),
                matrices("mlp2_weight"),
                get(prefix + "mlp.mlp2_bias"),
            ),
        )


class Gguf:
    """Layout "gguf". With ``fused`` gate and up are one tensor, the rows of gate first."""

    name: LayoutName = "gguf"
    # What other writers call otherwise, within a layer.
    output, sinks, moe_norm = "attn_output", "attn_sinks.weight", "post_attention_norm.weight"
    expert_types: tuple[str, ...] = MXFP4_OR_FLOATS

    def __init__(self, *, fused: bool) -> None:
        self.fused = fused

    def layer_prefix(self, layer: int) -> str:
        return f"blk.{layer}."

    def expected(self, config: ModelConfig) -> dict[str, Expected]:
        D, F, V, E = config.hidden_size, config.intermediate_size, config.vocab_size, config.num_experts
        gate_up = {"ffn_gate_up_exps": 2 * F} if self.fused else {"ffn_gate_exps": F, "ffn_up_exps": F}
        tensors = {"token_embd.weight": Expected((V, D), FLOATS_OR_QUANTISED)}
        for i in range(config.num_layers):
            layer = {
                "attn_norm.weight": Expected((D,)),
                **self.attention_inputs(config),
                f"{self.output}.weight": Expected((D, config.num_heads * config.head_dim), FLOATS_OR_QUANTISED),
                f"{self.output}.bias": Expected((D,)),
                self.sinks: Expected((config.num_heads,)),
                self.moe_norm: Expected((D,)),
                "ffn_gate_inp.weight": Expected((E, D), FLOATS_OR_QUANTISED),
                "ffn_gate_inp.bias": Expected((E,)),
                "ffn_down_exps.weight": Expected((E, D, F), self.expert_types),
                "ffn_down_exps.bias": Expected((E, D)),
            }
            for name, rows in gate_up.items():
                layer[f"{name}.weight"] = Expected((E, rows, D), self.expert_types)
                layer[f"{name}.bias"] = Expected((E, rows))
            tensors |= {self.layer_prefix(i) + name: expected for name, expected in layer.items()}
        tensors["output_norm.weight"] = Expected((D,))
        tensors["output.weight"] = Expected((V, D), FLOATS_OR_QUANTISED)
        return tensors

    def attention_inputs(self, config: ModelConfig) -> dict[str, Expected]:
        """The tensors of q, k and v."""
        q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        tensors = {}
        for name, rows in (("attn_q", q_rows), ("attn_k", kv_rows), ("attn_v", kv_rows)):
            tensors[f"{name}.weight"] = Expected((rows, config.hidden_size), FLOATS_OR_QUANTISED)
            tensors[f"{name}.bias"] = Expected((rows,))
        return tensors

    def outer(self, get: Get) -> ModelArrays:
        return ModelArrays(get("token_embd.weight"), get("output_norm.weight"), get("output.weight"))

    def layer(self, get: Get, config: ModelConfig, layer: int) -> LayerArrays:
        prefix = self.layer_prefix(layer)

        def dense(name: str) -> Dense:
            return Dense(get(f"{prefix}{name}.weight"), get(f"{prefix}{name}.bias"))

        q, k, v = self.queries_keys_values(dense, config)
        down = dense("ffn_down_exps")
        if self.fused:
            experts = self.experts_of(dense("ffn_gate_up_exps"), down, config)
        else:
            gate, up = dense("ffn_gate_exps"), dense("ffn_up_exps")
            experts = ExpertArrays(gate.weight_OI, up.weight_OI, down.weight_OI, gate.bias_O, up.bias_O, down.bias_O)
        return LayerArrays(
            attention_norm_D=get(prefix + "attn_norm.weight"),
            q=q,
            k=k,
            v=v,
            o=dense(self.output),
            sinks_Q=get(prefix + self.sinks),
            moe_norm_D=get(prefix + self.moe_norm),
            router=dense("ffn_gate_inp"),
            experts=experts,
        )

    def queries_keys_values(self, dense: Callable[[str], Dense], config: ModelConfig) -> tuple[Dense, Dense, Dense]:
        return dense("attn_q"), dense("attn_k"), dense("attn_v")

    def experts_of(self, gate_up: Dense, down: Dense, config: ModelConfig) -> ExpertArrays:
        """Of gate and up as one tensor."""
        F = config.intermediate_size
        return ExpertArrays(
            _rows(gate_up.weight_OI, slice(0, F)),
            _rows(gate_up.weight_OI, slice(F, None)),
            down.weight_OI,
            gate_up.bias_O[:, :F],
            gate_up.bias_O[:, F:],
            down.bias_O,
        )


class Ollama(Gguf):
    """Layout "ollama". With ``fused_qkv``, of a conversion of original/, q, k and v are the rows of one matrix; with
    ``fused`` the rows of gate and up alternate."""

    name: LayoutName = "ollama"
    output, sinks, moe_norm = "attn_out", "attn_sinks", "ffn_norm.weight"
    expert_types = ("MXFP4_PAIRS", *MXFP4_OR_FLOATS)

    def __init__(self, *, fused_qkv: bool, fused: bool) -> None:
        super().__init__(fused=fused)
        self.fused_qkv = fused_qkv

    def attention_inputs(self, config: ModelConfig) -> dict[str, Expected]:
        if not self.fused_qkv:
            return super().attention_inputs(config)
        rows = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        return {"attn_qkv.weight": Expected((rows, config.hidden_size)), "attn_qkv.bias": Expected((rows,))}

    def queries_keys_values(self, dense: Callable[[str], Dense], config: ModelConfig) -> tuple[Dense, Dense, Dense]:
        if not self.fused_qkv:
            return super().queries_keys_values(dense, config)
        return _split_qkv(dense("attn_qkv"), config)

    def experts_of(self, gate_up: Dense, down: Dense, config: ModelConfig) -> ExpertArrays:
        return _alternating_experts(gate_up.weight_OI, gate_up.bias_O, down.weight_OI, down.bias_O)


HF = HuggingFace(mxfp4=True)
HF_BF16 = HuggingFace(mxfp4=False)
ORIGINAL = Original()
SAFETENSORS: dict[LayoutName, Layout] = {layout.name: layout for layout in (HF, HF_BF16, ORIGINAL)}


def detect_layout(names: Iterable[str], where: object) -> Layout:
    """The layout that tensors of these names come in. Raises CheckpointError when it is none."""
    names = list(names)
    if any(name.endswith(".attn_sinks") for name in names):
        fused_qkv, fused = (any(part in name for name in names) for part in ("attn_qkv", "ffn_gate_up_exps"))
        return Ollama(fused_qkv=fused_qkv, fused=fused)
    if any(name.startswith(("blk.", "token_embd.")) for name in names):
        return Gguf(fused=any("ffn_gate_up_exps" in name for name in names))
    if any(name.startswith(("block.", "embedding.")) for name in names):
        return ORIGINAL
    if any(name.startswith("model.") for name in names):
        return HF if any(name.endswith("_blocks") for name in names) else HF_BF16
    raise CheckpointError(
        f"{where} does not hold a gpt-oss model: expected tensors such as model.layers.0.self_attn.q_proj.weight or "
        f"block.0.attn.qkv.weight, found {', '.join(names[:3]) or 'none'}. Choose for example gpt-oss-20b."
    )


def _mxfp4(prefix: str, shape: tuple[int, ...]) -> dict[str, Expected]:
    *rows, columns = shape
    return {
        f"{prefix}blocks": Expected((*rows, columns // 32, 16), BYTES),
        f"{prefix}scales": Expected((*rows, columns // 32), BYTES),
    }


def _split_qkv(qkv: Dense, config: ModelConfig) -> tuple[Dense, Dense, Dense]:
    """q, k and v of a matrix of all their rows."""
    k_start = config.num_heads * config.head_dim
    v_start = k_start + config.num_kv_heads * config.head_dim
    parts = (slice(0, k_start), slice(k_start, v_start), slice(v_start, None))
    q, k, v = (Dense(qkv.weight_OI[rows], qkv.bias_O[rows]) for rows in parts)
    return q, k, v


def _alternating_experts(
    gate_up: Mxfp4 | Array, gate_up_bias_EF: Array, down: Mxfp4 | Array, down_bias_ED: Array
) -> ExpertArrays:
    return ExpertArrays(
        gate=_rows(gate_up, slice(0, None, 2)),
        up=_rows(gate_up, slice(1, None, 2)),
        down=down,
        gate_bias_EF=gate_up_bias_EF[:, 0::2],
        up_bias_EF=gate_up_bias_EF[:, 1::2],
        down_bias_ED=down_bias_ED,
    )


def _rows(matrices: Mxfp4 | Array, rows: slice) -> Mxfp4 | Array:
    """Some rows of every matrix [E, O, I]."""
    if isinstance(matrices, Mxfp4):
        return matrices._replace(blocks=matrices.blocks[:, rows], scales=matrices.scales[:, rows])
    return matrices[:, rows]
