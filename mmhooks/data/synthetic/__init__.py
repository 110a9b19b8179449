"""Data that is drawn: words, objects, backgrounds."""
