"""Other toolkits' views of a hooked model: TransformerLens and nnsight."""
