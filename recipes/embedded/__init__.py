"""How the embedded models were trained: ``PYTHONPATH=recipes python -m embedded.clip.train --help``."""
