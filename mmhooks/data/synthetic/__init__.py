"""Synthetic images: rendered words, objects, backgrounds."""
