"""Image-text data: :func:`pairs` opens any source as :class:`Pairs`, :func:`pair_stream` data sets too large to store,
:func:`from_tensors` sounds and videos, :func:`text_pool` lists of texts, and :func:`families` says which pairs are not
independent."""

from mmhooks.data.families import families, near_duplicates
from mmhooks.data.pair_set import Pair, Pairs
from mmhooks.data.pair_stream import PairStream, pair_stream
from mmhooks.data.sources.pairs import pairs
from mmhooks.data.sources.text_pools import TextPool, splice_vocabulary, text_pool
from mmhooks.data.tensor_pairs import TensorPairs, from_tensors

__all__ = [
    "Pair",
    "PairStream",
    "Pairs",
    "TensorPairs",
    "TextPool",
    "families",
    "from_tensors",
    "near_duplicates",
    "pair_stream",
    "pairs",
    "splice_vocabulary",
    "text_pool",
]
