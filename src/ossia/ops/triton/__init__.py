"""Triton kernels of the GPU backend, each file with the functions that launch them; `ossia.ops.gpu` alone calls these.

    moe         experts in MXFP4 or as numbers, tokens sorted by expert
    attention   paged keys and values, sinks, windows, split over the keys where there is one query
    qkv         norm, q, k, v, rope and the writing of keys and values of few tokens in one
    fused       norm, rope, routing
    sampling    one token from each row of logits, log-probabilities
    fetch       chosen experts from the host's memory
    choice      which variant of them a card gets
    tile        what they share

With TRITON_INTERPRET=1 in the environment, before the first import, Triton runs the kernels in numpy on the CPU.
"""
