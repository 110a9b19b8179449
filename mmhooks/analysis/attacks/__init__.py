"""Attacks through an image: pixels, the alignment defence, victims and judges."""
