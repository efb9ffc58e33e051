"""One request, start to end, without HTTP: items to messages, the loop, stream events."""
