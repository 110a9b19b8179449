"""Writers of README and docs: ``cd recipes && python -m publish.readme --help``."""
