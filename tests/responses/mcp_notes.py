"""A server of the Model Context Protocol over standard input and output, for tests."""

from __future__ import annotations

from mcp.server import MCPServer

server = MCPServer("notes")


@server.tool()
def add(a: int, b: int) -> str:
    """Add two numbers."""
    return str(a + b)


@server.tool()
def fail() -> str:
    """Fail."""
    raise ValueError("never works")


if __name__ == "__main__":
    server.run("stdio")
