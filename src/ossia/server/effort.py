"""How long to think, from wherever clients of OpenAI, Anthropic, Ollama, vLLM and OpenRouter say it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Tokens that a client sets aside for thinking, up to which the effort is low and medium.
_LOW_BUDGET, _MEDIUM_BUDGET = 4_096, 16_384


def effort_of(fields: Mapping[str, Any]) -> Any:
    """The effort that a body asks for, as it was written; None if it does not say.

    The API's own ``reasoning_effort`` comes first, then ``output_config``, ``chat_template_kwargs``, ``reasoning``,
    ``think`` and ``thinking``. A client that wants no thoughts gets the least that the model can do.
    """
    if fields.get("reasoning_effort"):
        return fields["reasoning_effort"]
    for name in ("output_config", "chat_template_kwargs", "reasoning"):
        place = fields.get(name)
        if isinstance(place, Mapping):
            found = place.get("reasoning_effort") or place.get("effort")
            if found or place.get("enabled") is False:
                return found or "none"
    think = fields.get("think")
    if think is not None:
        return think if isinstance(think, str) else "medium" if think else "none"
    return _of_budget(fields.get("thinking"))


def budget_of(fields: Mapping[str, Any]) -> int | None:
    """Tokens after which the thinking is to be ended; None for no such wish."""
    for name, key in (("reasoning", "max_tokens"), ("thinking", "budget_tokens")):
        place = fields.get(name)
        budget = place.get(key) if isinstance(place, Mapping) else None
        if isinstance(budget, int) and budget > 0:
            return budget
    return None


def _of_budget(thinking: object) -> str | None:
    if not isinstance(thinking, Mapping):
        return None
    kind, budget = thinking.get("type"), thinking.get("budget_tokens")
    if kind == "disabled":
        return "none"
    if not isinstance(budget, int):
        return None
    return "low" if budget <= _LOW_BUDGET else "medium" if budget <= _MEDIUM_BUDGET else "high"
