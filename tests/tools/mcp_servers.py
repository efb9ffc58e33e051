"""Real servers of the protocol, for the client to meet: good, odd and hostile. Run as a program: over standard input
and output."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import mcp_types as types
from mcp.server import Server


def tool(name, description="A tool.", properties=None, **annotations):
    hints = types.ToolAnnotations(**annotations) if annotations else None
    schema = {"type": "object", "properties": properties or {"text": {"type": "string"}}}
    return types.Tool(name=name, description=description, input_schema=schema, annotations=hints)


def text(*parts, is_error=False):
    return types.CallToolResult(content=[types.TextContent(text=part) for part in parts], is_error=is_error)


class Scripted:
    """A server whose tools can be changed while it runs, and that remembers what it was asked."""

    def __init__(self, note: Path | None = None) -> None:
        self.tools = [
            tool("echo", "Say it again.", read_only_hint=True),
            tool("write", "Write it down."),
            tool("count", "Count the calls of this connection."),
            tool("wait"),
            tool("fail"),
            tool("kinds"),
            tool("environment"),
        ]
        self.calls: list[tuple[str, dict]] = []
        self.cancelled: list[str] = []
        self.note = note
        self.num_lists = 0
        self.page_size = 100

    def server(self) -> Server:
        return Server("scripted", instructions="Use it well.", on_list_tools=self._list, on_call_tool=self._call)

    async def _list(self, _context, params):
        self.num_lists += 1
        start = int(params.cursor or 0) if params else 0
        end = start + self.page_size
        more = str(end) if end < len(self.tools) else None
        return types.ListToolsResult(tools=self.tools[start:end], next_cursor=more)

    async def _call(self, context, params):
        arguments = params.arguments or {}
        self.calls.append((params.name, arguments))
        match params.name:
            case "wait":
                try:
                    await asyncio.sleep(30)
                except asyncio.CancelledError:
                    self.cancelled.append("wait")
                    if self.note:
                        self.note.write_text("cancelled")
                    raise
            case "fail":
                return text("it went wrong", is_error=True)
            case "crash":
                raise RuntimeError("inner words")
            case "exit":
                os._exit(3)
            case "large":
                return text("x" * int(arguments["n"]))
            case "nothing":
                return types.CallToolResult(content=[])
            case "structured":
                return types.CallToolResult(content=[], structured_content={"a": [1]})
            case "kinds":
                png = types.ImageContent(data="AAAA", mime_type="image/png")
                link = types.ResourceLink(name="doc", uri="file:///doc")
                inner = types.EmbeddedResource(resource=types.TextResourceContents(uri="a:b", text="inner"))
                blob = types.EmbeddedResource(
                    resource=types.BlobResourceContents(uri="a:c", blob="AAAA", mime_type="application/x")
                )
                return types.CallToolResult(content=[types.TextContent(text="words"), png, link, inner, blob])
            case "environment":
                return text(json.dumps(dict(os.environ)))
            case "headers":
                return text(json.dumps(dict(context.request.headers)))
            case "count":
                return text(str(sum(name == "count" for name, _ in self.calls)))
        return text(f"{params.name}: {arguments.get('text', '')}")


if __name__ == "__main__":
    from mcp.server.stdio import stdio_server

    async def main():
        scripted = Scripted(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
        if "--crash" in sys.argv:
            print("the secret is hunter22 and it is broken", file=sys.stderr, flush=True)
            os._exit(1)
        if scripted.note:
            scripted.note.with_suffix(".pid").write_text(str(os.getpid()))
        scripted.tools.append(tool("exit"))
        server = scripted.server()
        async with stdio_server() as (reading, writing):
            await server.run(reading, writing, server.create_initialization_options())

    asyncio.run(main())
