"""Utilities for all other packages: files, digests, escaping, progress, processes. Imports only ``mmhooks.errors``."""
