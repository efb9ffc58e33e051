"""What the server says of itself: the OpenAPI document, and the same as a page that needs nothing from elsewhere.

FastAPI writes the document from the routes; here it is told what FastAPI cannot know: that faults have the APIs' own
shapes, which answers can also be streams, and that a key may be asked for.
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from ossia.responses.schema import Json

_DESCRIPTION = (
    "OpenAI's Responses, Chat Completions and Completions APIs and Anthropic's Messages for gpt-oss, served by ossia. "
    "Point a client of theirs at this server: OpenAI's at `/v1`, Anthropic's at `/`."
)
# Operations that answer with events if asked to stream, and what they send.
_STREAMS = {
    ("post", "/v1/responses"): "Events of the Responses API; the last is `data: [DONE]`.",
    ("get", "/v1/responses/{response_id}"): "The events of the response again, byte for byte, and those to come.",
    ("post", "/v1/chat/completions"): "Chunks of a chat completion; the last is `data: [DONE]`.",
    ("post", "/v1/completions"): "Chunks of a completion; the last is `data: [DONE]`.",
    ("post", "/v1/messages"): "Events of Anthropic's Messages.",
}
# One of its server-sent events; the data are JSON, but for the last.
_EVENT = {
    "type": "object",
    "required": ["data"],
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
}
_OPEN_PATHS = ("/health", "/ready")
_STRING = {"type": "string"}
_NULLABLE = {"anyOf": [_STRING, {"type": "null"}]}
_ERRORS: Json = {
    "Error": {
        "type": "object",
        "description": "A fault in the shape of OpenAI's APIs.",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {"message": _STRING, "type": _STRING, "param": _NULLABLE, "code": _NULLABLE},
            }
        },
    },
    "MessagesError": {
        "type": "object",
        "description": "A fault in the shape of Anthropic's API.",
        "required": ["type", "error"],
        "properties": {
            "type": {"const": "error"},
            "error": {
                "type": "object",
                "required": ["type", "message"],
                "properties": {"type": _STRING, "message": _STRING},
            },
        },
    },
}


def says(model: type[Any]) -> dict[int | str, dict[str, Any]]:
    """What a route answers, as it tells FastAPI: a type of the openai package's, or one like it."""
    return {200: {"model": model}}


def openapi(app: FastAPI) -> Json:
    """The document. Takes a second or two."""
    document: Json = get_openapi(title="ossia", version="1", description=_DESCRIPTION, routes=app.routes)
    schemas = document["components"]["schemas"]
    # FastAPI's own shape of faults, which nothing here answers with.
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schemas |= _ERRORS
    document["components"]["securitySchemes"] = {
        "key": {"type": "http", "scheme": "bearer", "description": "A key of the server's, if it asks for one."},
        "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "The same key."},
    }
    document["security"] = [{}, {"key": []}, {"x-api-key": []}]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            _correct(operation, method, path)
    return document


def _correct(operation: Json, method: str, path: str) -> None:
    responses = operation["responses"]
    responses.pop("422", None)
    for answer in responses.values():
        for kind, media in answer.get("content", {}).items():
            # FastAPI takes a response class that is not its own for a text.
            if "$ref" in media["schema"]:
                media["schema"].pop("type", None)
            elif kind == "application/json" and media["schema"] == {"type": "string"}:
                media["schema"] = {"type": "object"}
    if path in _OPEN_PATHS:
        operation["security"] = []
        return
    error = "MessagesError" if path.startswith("/v1/messages") else "Error"
    faults = {"4XX": "The request cannot be answered as it is.", "5XX": "The server cannot answer it now."}
    for status, description in faults.items():
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{error}"}}}
        responses[status] = {"description": description, "content": content}
    if (method, path) in _STREAMS:
        stream = {"schema": {**_EVENT, "description": _STREAMS[method, path]}}
        responses["200"]["content"]["text/event-stream"] = stream


# The page --------------------------------------------------------------------------------------------------------

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
code,pre{font:13px/1.5 ui-monospace,monospace;background:#f4f4f4;padding:.1em .3em;border-radius:3px}
pre{padding:.8em;overflow:auto}summary{cursor:pointer;padding:.25em 0}summary b{display:inline-block;min-width:4.5em}
table{border-collapse:collapse;margin:.5em 0 1em}td{border-top:1px solid #ddd;padding:.25em .8em .25em 0;
vertical-align:top}h2{margin-top:2em}
@media (prefers-color-scheme:dark){body{color:#ddd;background:#181818}code,pre{background:#2a2a2a}td{border-color:#444}
a{color:#8bf}}
"""


def page(document: Json, model: str, base_url: str) -> str:
    """The document for people: every endpoint, its parameters, the fields of its body. No script, nothing fetched."""
    groups: dict[str, list[str]] = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            tag = (operation.get("tags") or ["Other"])[0]
            groups.setdefault(tag, []).append(_operation(document, method, path, operation))
    body = "".join(f"<h2>{_text(tag)}</h2>{''.join(shown)}" for tag, shown in groups.items())
    example = (
        "from openai import OpenAI\n\n"
        f'client = OpenAI(base_url="{base_url.rstrip("/")}/v1", api_key="none")\n'
        f'response = client.responses.create(model={model!r}, input="Why is the sky blue?")\n'
        "print(response.output_text)"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>ossia</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>'
        f"<h1>ossia</h1><p>{_text(document['info']['description'])} The model here is <code>{_text(model)}</code>; "
        'the document itself: <a href="/openapi.json">/openapi.json</a>.</p>'
        f"<pre>{_text(example)}</pre>{body}</body></html>"
    )


def _operation(document: Json, method: str, path: str, operation: Json) -> str:
    given = operation.get("parameters", ())
    rows = [_row(f"{one['name']} ({one['in']})", one["schema"], document, one) for one in given]
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    for name, schema in _properties(content.get("schema", {}), document):
        rows.append(_row(name, schema, document, schema))
    table = f"<table>{''.join(rows)}</table>" if rows else "<p>Nothing is to be given.</p>"
    answers = "; ".join(operation["responses"]["200"].get("content", {}))
    return (
        f"<details><summary><b>{method.upper()}</b> <code>{_text(path)}</code> {_text(operation.get('summary', ''))}"
        f"</summary>{table}<p>Answers with {_text(answers)}.</p></details>"
    )


def _row(name: str, schema: Json, document: Json, described: Json) -> str:
    kind, text = _text(_type(schema, document)), _text(described.get("description") or "")
    return f"<tr><td><code>{_text(name)}</code></td><td>{kind}</td><td>{text}</td></tr>"


def _properties(schema: Json, document: Json) -> Iterator[tuple[str, Json]]:
    for part in (schema, *schema.get("anyOf", ())):
        yield from _resolved(part, document).get("properties", {}).items()


def _type(schema: Json, document: Json) -> str:
    """A word or two for what a value is."""
    if "$ref" in schema:
        inner = ", ".join(_resolved(schema, document).get("properties", {}))
        return f"object: {inner}" if inner else "object"
    if parts := schema.get("anyOf"):
        named = [_type(part, document) for part in parts if part.get("type") != "null"]
        return " or ".join(dict.fromkeys(named))
    if "enum" in schema:
        return ", ".join(str(value) for value in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}), document)}"
    limits = [f"{sign} {schema[key]}" for sign, key in (("≥", "minimum"), ("≤", "maximum")) if key in schema]
    return " ".join([str(schema.get("type", "anything")), *limits])


def _resolved(schema: Json, document: Json) -> dict[str, Any]:
    name = schema.get("$ref", "").rpartition("/")[2]
    found: dict[str, Any] = document["components"]["schemas"].get(name, {}) if name else schema
    return found


def _text(text: str) -> str:
    return html.escape(text)
