"""Ablations and their effect on classification."""
