"""The number of each row's token in a store by token, read when asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from mmhooks.data.store.layout import TOKEN
from mmhooks.data.store.shard import Shards

TokenNumbers = Callable[[], Int[Tensor, " rows"]]


@dataclass(frozen=True, eq=False)
class StoredTokens:
    """Reads the token of each row from the shards."""

    shards: Shards

    def __call__(self) -> Int[Tensor, " rows"]:
        return self.shards.column(TOKEN.name)


@dataclass(frozen=True, eq=False)
class ChosenTokens:
    """Those of some rows."""

    base: TokenNumbers
    index: Int[Tensor, " chosen"]

    def __call__(self) -> Int[Tensor, " chosen"]:
        return self.base()[self.index]
