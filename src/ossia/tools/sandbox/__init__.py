"""Where the model's code runs, so that nothing it does reaches the host. See docs/sandbox.md."""
