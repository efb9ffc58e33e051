"""Text for the model that is no longer than it may be."""

from __future__ import annotations


def shortened(text: str, max_chars: int) -> str:
    """The text, or its beginning and end with the number of characters left out between them."""
    if len(text) <= max_chars:
        return text
    head = max_chars * 2 // 3
    tail = max_chars - head
    return f"{text[:head]}\n[... {len(text) - max_chars:,} characters left out ...]\n{text[len(text) - tail :]}"
