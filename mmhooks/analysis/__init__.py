"""Measures over activations: each takes tensors and returns a small frozen result with its intervals."""
