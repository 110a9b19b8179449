"""Towers: where an encoder's embeddings, layers, norms and pooling are, whatever model it is a part of."""
