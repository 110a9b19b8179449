"""How the embedded models were trained: ``cd recipes && python -m embedded.clip.train --help``."""
