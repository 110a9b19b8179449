"""The card of a published head: licence, base model, data, sites, held-out measures, and code that loads it.

The metadata at its top are those that the Hugging Face Hub reads: https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal

from mmhooks.heads.base import Head
from mmhooks.utils.assets import EMBEDDED, EMBEDDED_VLMS, card
from mmhooks.utils.escape import markdown, one_line

# What ships with the package is under its licence; the licences of the drawings are listed with the data.
OWN_LICENCE = "apache-2.0"
NOT_STATED = "not stated"
INPUTS = {
    True: "raw vectors, which it gives unit norm",
    "layer_norm": "raw vectors, which it gives layer norm",
}
MEANINGS = {
    "n": "rows",
    "fvu": "variance left unexplained: 0 is perfect, 1 is the mean",
    "cosine": "cosine of vector and reconstruction",
    "l0": "active features a row",
    "dead": "share of features that no row activates",
    "rare": "share of features that few rows activate",
    "density": "share of rows that activate a feature, mean",
}
# Told in their own rows, or of use on the machine of the training alone.
TOLD = {"licence", "model", "model_name", "base_model", "data", "site", "sites", "hook_name", "store"}


@dataclass(frozen=True)
class CardFacts:
    """What a card states that weights do not tell.

    Attributes:
        licence: an identifier of the Hub such as ``"apache-2.0"``, or the name of another licence.
        base_model: the model whose vectors the head reads; ``owner/name`` if it is on the Hub.
        data: what it was trained on.
        sources: names, licences and attributions of that data, one sentence each.
        base_on_hub: whether ``base_model`` is a repository of the Hub.
    """

    licence: str | None = None
    base_model: str | None = None
    data: str | None = None
    sources: tuple[str, ...] = ()
    base_on_hub: bool = False

    @property
    def missing(self) -> list[str]:
        """The arguments of :meth:`Head.push_to_hub` that would complete the card."""
        facts = {"licence": self.licence, "base_model": self.base_model, "data": self.data}
        return [name for name, value in facts.items() if value is None]


def card_facts(
    head: Head, *, licence: str | None = None, base_model: str | None = None, data: str | None = None
) -> CardFacts:
    """Collects a card's facts: those given, else those in ``head.info``, else those of an embedded base model.

    Args:
        licence, base_model, data: as in :class:`CardFacts`.

    >>> import mmhooks as mm
    >>> facts = card_facts(mm.load_head("mini/sae"))
    >>> facts.base_model, facts.licence, facts.missing
    ('mini', 'apache-2.0', [])
    """
    info = head.info
    on_hub = base_model or _text(info.get("base_model"))
    base = on_hub or _text(info.get("model_name")) or _text(info.get("model"))
    sources: tuple[str, ...] = ()
    known = info.get("data")
    if data is None and isinstance(known, dict):
        pairs = known.get("pairs")
        data = f"{known.get('name', NOT_STATED)}" + (f", {pairs:,} pairs" if isinstance(pairs, int) else "")
        sources = tuple(f"{known[key]}" for key in ("licence", "attribution") if known.get(key))
    licence = licence or _text(info.get("licence"))
    if base in (*EMBEDDED, *EMBEDDED_VLMS):
        licence = licence or OWN_LICENCE
        drawings = card(base)["data"]
        sources += tuple(f"{d['attribution']} ({d['licence']})" for d in drawings if d.get("trained_on", 1))
    return CardFacts(
        licence=licence,
        # A name may be the folder that a model was read from, which is nobody else's business.
        base_model=PurePath(base).name if base and PurePath(base).is_absolute() else base,
        data=data or _text(known),
        sources=sources,
        base_on_hub=bool(on_hub and re.fullmatch(r"[\w.-]+/[\w.-]+", on_hub)),
    )


def head_card(
    head: Head, repo: str, format: Literal["mmhooks", "saelens"], inside: str | None, facts: CardFacts
) -> str:
    """Writes the model card of ``head`` as it is published in ``repo``, as Markdown.

    Args:
        format: of the published files.
        inside: the folder of the repository that they are in.

    >>> import mmhooks as mm
    >>> sae = mm.load_head("mini/sae")
    >>> text = head_card(sae, "me/sae", "mmhooks", None, card_facts(sae))
    >>> [line for line in text.splitlines() if line.startswith(("license", "| fvu_image", "model ="))]
    ['license: apache-2.0', '| fvu_image | 0.2632 | 0.2684 | 0.2526 |', 'model = mm.load("mini")']
    """
    measures = "".join(_held_out(head.info)) or "No measures on held-out data were recorded.\n"
    theirs = f"\nWith SAELens, on the same raw vectors:\n\n{_in_saelens(head, repo, inside)}"
    return (
        f"---\n{_metadata(facts, format)}\n---\n\n# {markdown(repo.split('/')[1])}\n\n{_table(head, facts)}\n"
        f"## Data\n\n{_data(facts)}\n## Held-out measures\n\n{measures}\n"
        f"## Use\n\n{_in_mmhooks(head, repo, inside, facts)}{theirs if format == 'saelens' else ''}"
    )


def _metadata(facts: CardFacts, format: str) -> str:
    """The block of YAML that the Hub reads."""
    from huggingface_hub import ModelCardData

    # The Hub knows licences by identifiers of small letters; any other is "other" with a name.
    listed = facts.licence is not None and re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", facts.licence)
    return ModelCardData(
        license=facts.licence if listed else "other" if facts.licence else None,
        license_name=None if listed or facts.licence is None else one_line(facts.licence),
        base_model=facts.base_model if facts.base_on_hub else None,
        library_name="sae_lens" if format == "saelens" else "mmhooks",
        tags=["sparse-autoencoder", "interpretability", "mmhooks"],
    ).to_yaml()


def _table(head: Head, facts: CardFacts) -> str:
    """The head and its facts, two columns."""
    rows: dict[str, Any] = {
        "kind": head.kind,
        "id": head.id,
        "width": head.d_in,
        "features": head.n_features,
        "input": INPUTS.get(head.normalize_input, "raw vectors as they are"),
        "licence": facts.licence or NOT_STATED,
        "base model": facts.base_model or NOT_STATED,
        "site": ", ".join(head.sites)
        or _text(head.info.get("hook_name"))
        or f"{NOT_STATED}; the code below names one",
        "data": facts.data or NOT_STATED,
    }
    recipe = head.info.get("recipe")
    more = head.info | (recipe if isinstance(recipe, dict) else {})
    rows |= {k: v for k, v in more.items() if k not in TOLD and isinstance(v, (str, int, float, bool))}
    return "| | |\n|---|---|\n" + "".join(f"| {_cell(k)} | {_cell(v)} |\n" for k, v in rows.items())


def _data(facts: CardFacts) -> str:
    """What the head was trained on, with the sources to name."""
    text = f"{markdown(facts.data or NOT_STATED)}\n"
    if facts.sources:
        text += "\nSources:\n\n" + "".join(f"- {markdown(source)}\n" for source in facts.sources)
    return text


def _held_out(info: dict[str, Any]) -> Iterator[str]:
    """The lines of the table of held-out measures: a row a measure, a column a set of rows."""
    columns: dict[str, dict[str, int | float]] = {}
    for key, found in info.items():
        if not (key == "held_out" or key.startswith("held_out_")) or not isinstance(found, dict):
            continue
        label = key.replace("_", " ")
        if numbers := _numbers(found):
            columns[label] = numbers
        nested = {name: _numbers(row) for name, row in found.items() if isinstance(row, dict)}
        columns |= {f"{label}, {name}": row for name, row in nested.items() if row}
    if not columns:
        return
    measures = list(dict.fromkeys(name for row in columns.values() for name in row))
    yield "| | " + " | ".join(map(_cell, columns)) + " |\n|---|" + "--:|" * len(columns) + "\n"
    for name in measures:
        cells = (f"{row[name]:,.4g}" if isinstance(row.get(name), float) else f"{row.get(name, '–')}"
                 for row in columns.values())  # fmt: skip
        yield f"| {_cell(name)} | {' | '.join(cells)} |\n"
    told = [
        f"{m}: {meaning}" for m, meaning in MEANINGS.items() if any(n.split("_")[0] == m for n in measures)
    ]
    if told:
        yield "\n" + "; ".join(told) + ".\n"


def _in_mmhooks(head: Head, repo: str, inside: str | None, facts: CardFacts) -> str:
    """Code that loads the head, attaches it and reads the features of an input, as far as the facts lead."""
    where = f", subfolder={json.dumps(inside)}" if inside else ""
    at, sites = "", head.sites
    if not sites and head.reconstructs and head.kind != "crosscoder":
        sites = ("image.embed", "text.embed")
        at = f", at={json.dumps(sites)}"
    elif not sites:
        at = ', at=["<the first of its sites>", "<the second>"]'
    base = facts.base_model or "<its base model>"
    if facts.base_on_hub:
        loaded = f'mm.load("hf:{base}")'
    elif base in (*EMBEDDED, *EMBEDDED_VLMS):
        loaded = f'mm.load("{base}")'
    else:
        loaded = f'mm.load({json.dumps(base)}, pretrained="<its tag>")'
    lines = [
        "import mmhooks as mm",
        f"model = {loaded}",
        f"head = mm.load_head({json.dumps(repo)}{where})",
        f"model.attach(head{at})",
    ]
    latents = json.dumps(f"{sites[0]}.{head.name}.latents") if sites else ""
    if sites and sites[0].startswith("image.") and head.reconstructs:
        lines += [
            'images = mm.data.pairs("<a folder of images>", captions="none")',
            "pixels = model.preprocess(images.image(0))[None]",
            f"_, cache = model.run_with_cache(images=pixels, sites=[{latents}])",
            f"features = cache[{latents}]",
        ]
    elif sites and sites[0].startswith("text.") and head.reconstructs:
        lines += [
            'tokens = model.tokenizer(["a red panda"])',
            f"_, cache = model.run_with_cache(texts=tokens, sites=[{latents}])",
            f"features = cache[{latents}]",
        ]
    return "```python\n" + lines[0] + "\n\n" + "\n".join(lines[1:]) + "\n```\n"


def _in_saelens(head: Head, repo: str, inside: str | None) -> str:
    """Code that loads the published head in SAELens."""
    sae_id = inside or "."
    return (
        "```python\nfrom huggingface_hub import snapshot_download\nfrom sae_lens import SAE\n\n"
        f'sae = SAE.load_from_disk(snapshot_download("{repo}") + "/{sae_id}")\n'
        f"features = sae.encode(x)  # x [*b, {head.d_in}]: vectors as they come\nrecon = sae(x)\n```\n"
    )


def _cell(value: object) -> str:
    """A value in a table, whose columns a bar would split."""
    return markdown(str(value).replace("|", "/"))


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _numbers(row: dict[str, Any]) -> dict[str, int | float]:
    return {k: v for k, v in row.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
