"""Adapters of every kind that PEFT makes for a gpt-oss model."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import torch

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ROUTER = ["mlp.router.weight"]

CASES: dict[str, dict[str, Any]] = {
    "attention": {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION},
    "one target": {"r": 3, "lora_alpha": 5, "target_modules": ["v_proj"]},
    "router": {"r": 2, "lora_alpha": 3, "target_modules": [], "target_parameters": ROUTER},
    "experts": {"r": 2, "lora_alpha": 6, "target_modules": [], "target_parameters": EXPERTS},
    "gate and up alone": {"r": 2, "lora_alpha": 6, "target_modules": [], "target_parameters": EXPERTS[:1]},
    "down alone": {"r": 3, "lora_alpha": 6, "target_modules": [], "target_parameters": EXPERTS[1:]},
    "all": {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "target_parameters": [*EXPERTS, *ROUTER]},
    "unembedding": {"r": 4, "lora_alpha": 8, "target_modules": ["lm_head"]},
    "embedding": {"r": 4, "lora_alpha": 8, "target_modules": ["embed_tokens", "q_proj"]},
    "rslora": {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "use_rslora": True, "target_parameters": EXPERTS},
    "rank pattern": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ATTENTION,
        "target_parameters": [*EXPERTS, *ROUTER],
        "rank_pattern": {"experts.gate_up_proj": 2, "layers.1.self_attn.q_proj": 6, r"layers\.[02]\..*k_proj": 1},
    },
    "alpha pattern": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ATTENTION,
        "target_parameters": [*EXPERTS, *ROUTER],
        "alpha_pattern": {"down_proj": 16, "router.weight": 3, "v_proj": 1},
    },
    "some layers": {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "layers_to_transform": [1]},
    "by expression": {"r": 4, "lora_alpha": 8, "target_modules": r".*layers\.[12]\.self_attn\.[qv]_proj"},
}


def trained(model, *, seed: int = 1, dtype: torch.dtype = torch.float32, **fields: Any) -> peft.PeftModel:
    """An adapter that has moved: both of its matrices are random."""
    fields = {"task_type": "CAUSAL_LM"} | fields
    if "layers_to_transform" in fields:
        fields["layers_pattern"] = "layers"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**fields))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                values = torch.randn(parameter.shape, generator=generator) * 0.2
                parameter.copy_(values.to(dtype))
    return wrapped.eval()


def save(wrapped: peft.PeftModel, path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(path)
