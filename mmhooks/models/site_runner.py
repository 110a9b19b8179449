"""Runs a hooked model over decoded batches and gives the columns of a store's rows: by pair, or by token."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Shaped
from PIL import Image
from torch import Tensor, nn

from mmhooks.data.loading import Batch, Decoder
from mmhooks.data.pair_set import Pairs
from mmhooks.data.pair_stream import PairStream
from mmhooks.data.store.layout import TOKEN, Precision, SiteSpec
from mmhooks.data.store.site_rows import sparse_entries
from mmhooks.data.tensor_pairs import TensorPairs
from mmhooks.errors import MMHooksError, ShapeMismatch
from mmhooks.hooks.places import Place
from mmhooks.hooks.selection import Tokens
from mmhooks.hooks.sites import Pattern
from mmhooks.hooks.splice import HeadSite
from mmhooks.models.encoder_tokens import patch_grid
from mmhooks.models.hooked import HookedModel
from mmhooks.models.pair_inputs import check_texts, preprocess_for, required_part
from mmhooks.models.token_rows import TokenChoice, TokenRows, grid_of, same_counts
from mmhooks.utils.modes import evaluating


class Computed(NamedTuple):
    """The rows of one batch.

    ``counts``: how many rows each pair has, None where rows are pairs; ``last``: the shard that the batch completes;
    ``ready``: a CUDA event after which the copies are there.
    """

    ids: list[str]
    columns: dict[str, Shaped[Tensor, "..."]]
    skipped: dict[str, str]
    counts: Sequence[int] | None
    last: int | None
    ready: Any


class SiteRunner:
    """Runs the towers that the sites need, under one open context; a context manager.

    Attributes:
        tokens: which tokens become rows; None: rows are pairs.
        grid: rows and columns of the patches, where the tokens are all of them; known after :meth:`specs`.
        tokens_a_pair: rows of a blank pair; known after :meth:`specs`.
    """

    def __init__(
        self,
        model: HookedModel,
        places: Sequence[Place],
        pairs: Pairs | PairStream,
        *,
        sparse: bool,
        tokens: Tokens = None,
    ) -> None:
        self.model, self.places = model, places
        self.tokens = None if tokens is None else TokenChoice.of(tokens)
        self.grid: tuple[int, int] | None = None
        self.tokens_a_pair = 1
        known, towers = model.places.sites.towers, {place.site.tower for place in places}
        if not towers <= known:  # a native path does not name its tower
            towers = known
        self.medium = getattr(getattr(model, "family", None), "medium", "image")
        # A vision-language model reads image and text with one processor.
        self.together = getattr(model, "read", None)
        one_by_one = self.together is None
        reads = one_by_one and self.medium in towers
        self.preprocess = preprocess_for(model, self.medium, pairs) if reads else None
        self.tokenizer = (
            required_part(model, "tokenizer", "text") if one_by_one and "text" in towers else None
        )
        if self.tokenizer is not None or self.together is not None:
            check_texts(pairs)
        self._blank = pairs.image(0) if isinstance(pairs, TensorPairs) else Image.new("RGB", (64, 64))
        self._sparse = sparse
        self._held = ExitStack()

    def decoder(self, pairs: Pairs | PairStream) -> Decoder:
        """What makes this model's input of pairs, in the workers."""
        return Decoder(pairs, self.preprocess, self.tokenizer, self.together)

    def __enter__(self) -> SiteRunner:
        heads = (a.head for a in self.model.places.attachments.values())
        modules = [m for m in (self.model.model, *heads) if isinstance(m, nn.Module)]
        self._held.enter_context(evaluating(*modules))
        self._held.enter_context(torch.no_grad())
        names = [place.name for place in self.places]
        self._cache = self._held.enter_context(self.model.caching(names, strict=False))
        return self

    def __exit__(self, *fault: Any) -> None:
        self._held.__exit__(*fault)

    def _inputs(self, batch: Batch) -> dict[str, Tensor]:
        given = {self.medium: batch.images, "text": batch.texts, **batch.inputs}
        return {k: self.model.to_input(v) for k, v in given.items() if v is not None}

    def _run(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """What flows at every site."""
        if self.together is not None:
            self.model.forward(**inputs)
        elif self.medium == "image":
            self.model.forward(**{f"{k}s": v for k, v in inputs.items()})
        else:
            for tower, value in inputs.items():
                getattr(self.model, f"encode_{tower}")(value)
        return {place.name: self._cache[place.name] for place in self.places}

    def _rows(self, inputs: dict[str, Tensor]) -> dict[str, TokenRows]:
        """The rows at every site; by pair each has one."""
        values, rows = self._run(inputs), {}
        for place in self.places:
            value = values[place.name]
            if self.tokens is not None:
                rows[place.name] = self.tokens.rows(self.model, place, value, inputs)
            else:
                # A feature map in stored layout, with channels last; a head's outputs already are.
                value = value if isinstance(place, HeadSite) else place.vectors_last(value)
                rows[place.name] = TokenRows(value, (1,) * len(value))
        return rows

    def specs(self, dtype: Precision) -> list[SiteSpec]:
        """Shapes of the sites, from a run over one blank pair.

        Raises:
            ShapeMismatch: a site whose rows are not one a pair, or not floating-point; sites with different tokens.
            UnknownSite: a site that did not fire.
        """
        images = None if self.preprocess is None else self.preprocess(self._blank)[None]
        texts = None if self.tokenizer is None else self.tokenizer(["a"])
        together = {} if self.together is None else self.together([self._blank], ["a"])
        inputs = self._inputs(Batch(0, True, ["blank"], images, texts, {}, together))
        with self:
            rows = self._rows(inputs)
            for place in self.places:
                self._check(place, rows[place.name])
            self.tokens_a_pair = same_counts(rows)[0] if self.tokens else 1
            self.grid = self._grid(inputs)
        self._specs = [self._spec(place, rows[place.name].values, dtype) for place in self.places]
        return self._specs

    def _check(self, place: Place, found: TokenRows) -> None:
        value = found.values
        one = self.tokens is not None or (value.dim() >= 2 and len(value) == 1)
        if not one or len(found.counts) != 1 or not value.is_floating_point():
            raise ShapeMismatch(
                f"site {place.name!r} gave {tuple(value.shape)} of {value.dtype} for one pair; a store keeps sites "
                "with floating-point rows, one a pair"
            )

    def _spec(self, place: Place, rows: Float[Tensor, "rows ..."], dtype: Precision) -> SiteSpec:
        shape = tuple(rows.shape[1:])
        head = place.attachment.head if isinstance(place, HeadSite) else None
        latents = self._sparse and isinstance(place, HeadSite) and place.leaf == "latents"
        positions = place.site.is_map and self.tokens is None
        entries = sparse_entries(head, shape) if latents else None
        return SiteSpec(place.name, shape, dtype, entries, head.id if head else "", positions=positions)

    def _grid(self, inputs: dict[str, Tensor]) -> tuple[int, int] | None:
        """Rows and columns of the patches, if the tokens are these."""
        if self.tokens is None or self.tokens.tokens not in ("patch", "image"):
            return None
        pixels = inputs.get("image", inputs.get("pixel_values"))
        found = next((g for place in self.places if (g := grid_of(place, self._cache[place.name]))), None)
        if found is None and pixels is not None and pixels.dim() == 4:
            try:
                found = patch_grid(self.model, (int(pixels.shape[-2]), int(pixels.shape[-1])))
            except (
                MMHooksError,
                NotImplementedError,
            ):  # merged or flattened patches: their tokens have no grid
                return None
        return found if found and found[0] * found[1] == self.tokens_a_pair else None

    def columns(self, batch: Batch) -> tuple[dict[str, Tensor], Sequence[int]]:
        """The columns of a batch's rows on the model's device, and how many rows each pair has."""
        if not batch.ids:
            return {}, []
        columns: dict[str, Tensor] = {}
        rows = self._rows(self._inputs(batch))
        for spec in self._specs:
            names, value = [column.name for column in spec.columns()], rows[spec.name].values
            kept = [value] if spec.sparse is None else _active(value, spec)
            columns |= zip(names, kept, strict=True)
        return columns, same_counts(rows)

    def __call__(self, batch: Batch) -> Computed:
        """The rows of a batch, for a writer."""
        columns, counts = self.columns(batch)
        ready = None
        if self.model.device.type == "cuda":
            columns = {name: _to_host(value) for name, value in columns.items()}
            ready = torch.cuda.Event()
            ready.record()
        if self.tokens is not None and counts:
            columns[TOKEN.name] = torch.cat([torch.arange(count, dtype=torch.int32) for count in counts])
        number = None if self.tokens is None else counts
        return Computed(batch.ids, columns, batch.skipped, number, batch.shard if batch.last else None, ready)


def chosen_places(model: HookedModel, sites: Pattern | Sequence[Pattern]) -> list[Place]:
    """The places that patterns select, each once.

    Raises:
        MMHooksError: no pattern.
        UnknownSite: a pattern that matches nothing.
    """
    patterns = [sites] if isinstance(sites, str) or callable(sites) else list(sites)
    found = {place.name: place for pattern in patterns for place in model.places.find(pattern)}
    if not found:
        raise MMHooksError("no site to extract: name at least one, e.g. sites=['image.embed', 'text.embed']")
    return list(found.values())


def _active(latents: Float[Tensor, "b n"], spec: SiteSpec) -> list[Tensor]:
    """Values, largest first, and indices of a row's active entries; padded with entries of value 0."""
    k = int(spec.sparse or 0)
    most = int(latents.count_nonzero(dim=1).max())
    if most > k:
        raise ShapeMismatch(
            f"{spec.name}: a row has {most} active entries, its head promises {k}: edits that are open add some; "
            "extract with sparse=False"
        )
    indices = latents.abs().topk(k, dim=1).indices
    return [latents.gather(1, indices), indices]


def _to_host(value: Tensor) -> Tensor:
    kept = torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=True)
    return kept.copy_(value, non_blocking=True)
