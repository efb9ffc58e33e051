"""Training, and what comes out of it: fine-tuned weights, adapters, checkpoints in the published layouts.

`export.py` and what it calls need numpy alone; the rest needs torch, the extra ``train``.
"""
