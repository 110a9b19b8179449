"""Kinds of layers: one file a kind, each adding the canonical sites of one layer under a prefix.

A family says where its towers, embeddings, norms and projections are; only the kinds know what a layer looks like inside.
"""
