"""Provenance of activations: weights, transforms and versions, as descriptions and digests equal in every process."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from importlib.metadata import version
from typing import Any

import torch

from mmhooks.hooks.program import EditOp
from mmhooks.hooks.splice import Attachment, HeadSite
from mmhooks.utils.digest import content_of, digest

VERSIONS = ("mmhooks", "torch", "torchvision", "open_clip_torch", "pyarrow", "pillow")


def weights_hash(module: torch.nn.Module, *, key: str | None = None) -> str:
    """Digest of what runs: classes, attributes and hooks of all modules; parameters, buffers and packed weights bit by bit.

    Raises:
        NoDigest: a part whose content cannot be seen, such as weights that are offloaded elsewhere, and no ``key``.
    """
    return digest(module, what="model", key=key)[:32]


def describe_transform(what: Any) -> str | None:
    """A description of a transform, equal in every process; different transforms may have the same one."""
    if what is None:
        return None
    name = getattr(what, "__qualname__", None)
    if name is not None:
        return f"{what.__module__}.{name}"
    said = repr(what) if type(what).__repr__ is not object.__repr__ else type(what).__qualname__
    return re.sub(r" at 0x[0-9a-f]+", "", said)


def versions() -> dict[str, str]:
    return {name: version(name) for name in VERSIONS} | {"python": platform.python_version()}


# -- heads and edits -----------------------------------------------------------------------------------------


def attachment_digest(attachment: Attachment, *, key: str | None = None) -> str:
    """Of a head as it is attached: its content, site and options."""
    where = (attachment.site.name, attachment.name, attachment.error_term, attachment.splice)
    where += tuple(source.name for source in attachment.sources)
    return digest(attachment.head, where, what=f"head {attachment.name}", key=key)


@dataclass(frozen=True)
class OpenEdit:
    """One edit of an open context at one place, which fully determines its effect there."""

    op: EditOp

    @property
    def label(self) -> str:
        return f"{self.op.binding.label} at {self.op.target.name}"

    def digest(self, *, key: str | None = None) -> str:
        target = self.op.target
        head = attachment_digest(target.attachment, key=key) if isinstance(target, HeadSite) else None
        return digest(target.name, head, self.op.act, what=self.label, key=key)


def edits_of(model: torch.nn.Module, contexts: Iterable[Any]) -> list[OpenEdit]:
    """The edits of open contexts that act on ``model``, in the order in which they act, whoever opened them."""
    inside = set(model.modules())
    ops = [op for context in contexts for op in context.ops if isinstance(op, EditOp)]
    owners = [op.target.site.tap.owner for op in ops]  # a pipeline too, whose parts may be the model's
    elsewhere = [isinstance(owner, torch.nn.Module) and owner not in inside for owner in owners]
    return [OpenEdit(op) for op, other in zip(ops, elsewhere, strict=True) if not other]


# -- what counts of objects that keep caches of what they were asked -----------------------------------------


@content_of("open_clip.tokenizer.SimpleTokenizer")
def _simple_tokenizer(tokenizer: Any) -> Any:
    own = {k: v for k, v in vars(tokenizer).items() if k not in ("cache", "decoder", "byte_decoder")}
    # Fifty thousand entries each: as one text they are hashed a hundred times faster.
    large = {k: repr(own.pop(k)) for k in ("encoder", "bpe_ranks", "byte_encoder") if k in own}
    return {**large, **own}


@content_of("_regex.Pattern")
def _regex(pattern: Any) -> Any:
    """As Python would copy it, it holds the code it was compiled to, which differs from process to process."""
    return pattern.pattern, pattern.flags, pattern.named_lists


@content_of("transformers.tokenization_utils_base.PreTrainedTokenizerBase")
def _transformers_tokenizer(tokenizer: Any) -> Any:
    """Not: the folder it was loaded from, and the padding that the last call asked for."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = {} if backend is None else json.loads(backend.to_str())
    fixed = {k: v for k, v in rules.items() if k not in ("padding", "truncation")}
    options = ("model_max_length", "padding_side", "truncation_side", "clean_up_tokenization_spaces")
    return (
        json.dumps(fixed),
        json.dumps(tokenizer.get_vocab() if backend is None else {}, sort_keys=True),
        repr(tokenizer.special_tokens_map),
        [getattr(tokenizer, name, None) for name in options],
    )


@content_of("transformers.configuration_utils.PreTrainedConfig")
@content_of("transformers.configuration_utils.PretrainedConfig")
def _transformers_config(config: Any) -> Any:
    own = config.to_dict()
    for name in ("_name_or_path", "_commit_hash", "transformers_version"):
        own.pop(name, None)
    return json.dumps(own, sort_keys=True, default=str), getattr(config, "_attn_implementation", None)


@content_of("mmhooks.hooks.edits.Edit")
def _edit(edit: Any) -> Any:
    """Where it acts is said by its places; features count by number, not by how they were chosen."""
    options = {f.name: getattr(edit, f.name) for f in fields(edit) if f.name not in ("features", "at")}
    return edit.index, options


@content_of("mmhooks.heads.base.Head")
def _head(head: Any) -> Any:
    """Not: its name, its notes, and the id that it remembers."""
    return head.kind, head.config(), dict(sorted(head.state_dict().items()))


@content_of("mmhooks.hooks.features.FeatureSet")
def _feature_set(features: Any) -> Any:
    """Name and provenance change nothing that an edit does."""
    return list(features), features.n_features, features.head


@content_of("mmhooks.models.hooked.HookedModel")
def _hooked_model(hooked: Any) -> Any:
    heads = {
        k: (a.head, a.error_term, a.splice, *(s.name for s in a.sources))
        for k, a in hooked.places.attachments.items()
    }
    return hooked.model, getattr(hooked, "preprocess", None), getattr(hooked, "tokenizer", None), heads
