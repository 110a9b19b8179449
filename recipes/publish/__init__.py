"""Writers of README and docs: ``PYTHONPATH=recipes python -m publish.readme --help``."""
