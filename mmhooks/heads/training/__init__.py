"""Training of heads from tensors or stores, resumable, in one or several processes."""
