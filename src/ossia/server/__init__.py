"""HTTP: the Responses and Chat Completions APIs, their store, limits and metrics."""
