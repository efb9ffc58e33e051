"""The gpt-oss model: its configuration, its forward pass, its checkpoints."""
