"""Pictures with their texts: :func:`pairs` opens every source, :class:`Pairs` is what comes back; :func:`pair_stream`
is for what is too large to keep; :func:`text_pool` opens lists of texts."""

from mmhooks.data.pair_set import Pair, Pairs
from mmhooks.data.pair_stream import PairStream, pair_stream
from mmhooks.data.sources.pairs import pairs
from mmhooks.data.sources.text_pools import TextPool, text_pool

__all__ = ["Pair", "PairStream", "Pairs", "TextPool", "pair_stream", "pairs", "text_pool"]
