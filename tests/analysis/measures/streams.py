"""Random streams of sparse latents, split into batches in any order, and metrics fed with them."""

from __future__ import annotations

import hypothesis.strategies as st
import torch

from mmhooks.data.sparse_rows import SparseRows

ROWS, N_FEATURES, DIM, ACTIVE = 24, 7, 4, 3  # sizes of a stream; ACTIVE entries per row


@st.composite
def streams(draw, signed=False):
    """Draws sparse latents of both sides, embeddings, and a split of the rows into batches in some order of merging."""
    seed = draw(st.integers(0, 10_000))
    generator = torch.Generator().manual_seed(seed)
    levels = draw(st.sampled_from([3, 1000]))  # few levels: many ties
    sides = []
    for _ in range(2):
        values = torch.randint(-levels if signed else 0, levels, (ROWS, ACTIVE), generator=generator) / levels
        indices = torch.rand(ROWS, N_FEATURES - 1, generator=generator).argsort(1)[
            :, :ACTIVE
        ]  # the last feature is dead
        indices[values == 0] = draw(st.integers(0, N_FEATURES - 1))  # padding points anywhere
        sides.append(SparseRows(values, indices, N_FEATURES))
    vectors = torch.randn(ROWS, DIM, generator=generator) + 0.5
    cuts = sorted(draw(st.sets(st.integers(1, ROWS - 1), max_size=5)))
    bounds = list(zip([0, *cuts], [*cuts, ROWS], strict=True))
    return sides[0], sides[1], vectors, draw(st.permutations(bounds)), draw(st.booleans())


def fed(make, bounds, *inputs, sparse, start=False):
    """Feeds each batch to a metric of its own and merges these in the given order."""
    inputs = [x if sparse or not isinstance(x, SparseRows) else x.dense() for x in inputs]
    whole = make()
    for begin, end in bounds:
        part = make()
        part.update(*(x[begin:end] for x in inputs), **({"start": begin} if start else {}))
        whole.merge_state(part)
        whole._update_count += 1
    return whole
