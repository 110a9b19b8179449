"""Training of heads: from tensors and stores, resumable, on one process or several."""
