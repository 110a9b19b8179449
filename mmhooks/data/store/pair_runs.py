"""Which rows of a store belong to which pair: in a store by token a run of rows, else one row each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mmhooks.errors import DataError, OutOfRange


@dataclass(frozen=True, eq=False)
class PairRuns:
    """The pairs of a store, in the order of their rows.

    Attributes:
        starts: the first row of each pair, and the number of rows.
        ids: of the pairs, a ``pyarrow.ChunkedArray``.
    """

    starts: Int[Tensor, " pairs_and_one"]
    ids: Any

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def counts(self) -> Int[Tensor, " pairs"]:
        """How many rows each pair has."""
        return self.starts.diff()

    def number(self, pair: int | str) -> int:
        """The pair's number: of an id, or itself.

        Raises:
            DataError: no such id.
            OutOfRange: no such number.
        """
        if isinstance(pair, str):
            found = self.ids.index(pair).as_py()
            if found < 0:
                raise DataError(f"expected an id of one of {len(self)} pairs, got {pair!r}")
            return found
        if not -len(self) <= pair < len(self):
            raise OutOfRange(f"expected the number of one of {len(self)} pairs, or its id, got {pair}")
        return pair % len(self)

    def span(self, pair: int | str) -> tuple[int, int]:
        """The rows of a pair: the first, and that behind the last."""
        number = self.number(pair)
        return int(self.starts[number]), int(self.starts[number + 1])

    def rows_of(self, pairs: Int[Tensor, " p"]) -> Int[Tensor, " rows"]:
        """All rows of these pairs, pair by pair.

        >>> PairRuns(torch.tensor([0, 2, 3, 6]), None).rows_of(torch.tensor([2, 0])).tolist()
        [3, 4, 5, 0, 1]
        """
        counts = self.counts[pairs]
        ends = counts.cumsum(0)
        inside = torch.arange(int(ends[-1]) if len(ends) else 0) - (ends - counts).repeat_interleave(counts)
        return self.starts[pairs].repeat_interleave(counts) + inside

    def pair_of(self, rows: Int[Tensor, " r"]) -> Int[Tensor, " r"]:
        """The number of each row's pair."""
        return torch.searchsorted(self.starts, rows, right=True) - 1


def run_starts(ids: Any) -> tuple[Int[Tensor, " runs"], Any]:
    """The first row of each run of equal neighbours in an Arrow array, and their values."""
    import pyarrow.compute

    pc: Any = pyarrow.compute  # its functions are created at run time
    runs = pc.run_end_encode(ids, run_end_type="int64")
    ends = torch.tensor(runs.run_ends.to_numpy())
    return torch.cat([ends.new_zeros(1), ends[:-1]]), runs.values


def pair_runs(ids: Any) -> PairRuns:
    """The runs of a ``ChunkedArray`` of ids; a run may cross the end of a chunk."""
    import pyarrow as pa

    starts, names, begin = [], [], 0
    for chunk in ids.chunks:
        if len(chunk):
            first, values = run_starts(chunk)
            if names and names[-1][-1].as_py() == values[0].as_py():
                first, values = first[1:], values[1:]
            starts.append(first + begin)
            names.append(values) if len(values) else None
            begin += len(chunk)
    starts.append(torch.tensor([begin]))
    return PairRuns(torch.cat(starts), pa.chunked_array(names, pa.string()))


def one_row_each(ids: Any) -> PairRuns:
    """The pairs of a store whose rows are pairs."""
    return PairRuns(torch.arange(len(ids) + 1), ids)
