"""The activation store: rows of activations in memory-mapped shards, written atomically, verified and resumable."""

from mmhooks.data.store.site_rows import SiteRows
from mmhooks.data.store.store import Store

__all__ = ["SiteRows", "Store"]
