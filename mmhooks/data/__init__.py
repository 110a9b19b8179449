"""Pictures with their texts: :func:`pairs` opens every source, :class:`Pairs` is what comes back; :func:`pair_stream`
is for what is too large to keep."""

from mmhooks.data.pair_set import Pair, Pairs
from mmhooks.data.pair_stream import PairStream, pair_stream
from mmhooks.data.sources import pairs

__all__ = ["Pair", "PairStream", "Pairs", "pair_stream", "pairs"]
