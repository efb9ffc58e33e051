"""The harmony chat format: messages, rendering to token ids, parsing back."""
