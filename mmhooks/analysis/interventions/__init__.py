"""Ablations, and what they do downstream."""
