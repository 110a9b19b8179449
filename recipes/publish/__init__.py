"""Writers of generated blocks in the docs: ``PYTHONPATH=recipes python -m publish.readme --help``."""
