"""Pictures with their texts: :func:`pairs` opens every source, :class:`Pairs` is what comes back."""

from mmhooks.data.pair_set import Pair, Pairs
from mmhooks.data.sources import pairs

__all__ = ["Pair", "Pairs", "pairs"]
