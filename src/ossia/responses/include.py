"""What `include` adds to items: outputs of code, sources and results of a search, the tokens and the time of reasoning,
and reasoning sealed for the way back.

Items are kept whole and shown without what was not asked for. (Log-probabilities can be asked for only when a response
is made: `message.output_text.logprobs` is read by the loop.)
"""

from __future__ import annotations

from collections.abc import Collection

from ossia.responses.convert import Entry, sealed_reasoning
from ossia.responses.schema import Json
from ossia.responses.seal import Seal


def shown(item: Json, include: Collection[str]) -> Json:
    """The item without what was not asked for."""
    kind = item.get("type")
    if kind == "code_interpreter_call" and "code_interpreter_call.outputs" not in include:
        return {**item, "outputs": None}
    if kind == "reasoning" and "reasoning.usage" not in include:
        return {name: value for name, value in item.items() if name != "usage"}
    action = item.get("action")
    if kind == "web_search_call" and isinstance(action, dict):
        if "web_search_call.action.sources" not in include:
            item = {**item, "action": {name: value for name, value in action.items() if name != "sources"}}
        if "web_search_call.results" not in include:
            item = {name: value for name, value in item.items() if name != "results"}
    return item


def retrieved(item: Json, entry: Entry | None, include: Collection[str], seal: Seal) -> Json:
    """An item that was kept, with what is asked for now; ``entry`` is what was kept of it, if anything."""
    if entry is None:
        return item
    if item.get("type") not in ("reasoning", "code_interpreter_call", "web_search_call"):
        return item
    told = shown(entry.item, include)
    if item["type"] == "reasoning" and "reasoning.encrypted_content" in include and entry.spoken:
        return {"encrypted_content": sealed_reasoning(entry.spoken[0], seal), **told}
    return told
