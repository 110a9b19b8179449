"""Site by site: what a cache shows is what a plain hook sees, and an edit acts behind its site and not before it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmhooks.analysis.verification.check import Check, equal_bits
from mmhooks.analysis.verification.subject import Subject
from mmhooks.analysis.verification.sums import layer_sums, projections
from mmhooks.analysis.verification.witnesses import has_witness, outputs_of, witnessed

_BLOCK = re.compile(r"^(.+?blocks\.\d+)\.")


def groups_of(names: Sequence[str]) -> list[list[str]]:
    """Sites in groups that are read in one run: those of a block, and the others of a tower.

    >>> groups_of(["image.patches", "image.blocks.0.z", "image.blocks.1.z", "image.embed"])
    [['image.patches', 'image.embed'], ['image.blocks.0.z'], ['image.blocks.1.z']]
    """
    found: dict[str, list[str]] = {}
    for name in names:
        block = _BLOCK.match(name)
        found.setdefault(block[1] if block else name.partition(".")[0], []).append(name)
    return list(found.values())


def read(subject: Subject, names: Sequence[str]) -> dict[str, Tensor]:
    """What a cache shows at those of the sites that fire, in one run."""
    with subject.model.caching(list(names), strict=False) as cache:
        subject.run()
    return {name: cache[name] for name in names if name in cache}


def idle_checks(subject: Subject, clean: Mapping[str, Tensor]) -> Iterator[Check]:
    """That outputs keep their bits under an idle context, a context that reads everything, and afterwards."""
    model = subject.model
    with model.hooks():
        idle = subject.run()
    for output, value in idle.items():
        yield equal_bits("output under an idle context = plain output", output, value, clean[output])
    with model.caching(list(model.places.sites.canonical), strict=False):
        reading = subject.run()
    for output, value in reading.items():
        yield equal_bits("output while all sites are read = plain output", output, value, clean[output])


def capture_checks(subject: Subject, names: Sequence[str]) -> Iterator[Check]:
    """Of one group of sites: captured values against plain hooks, and the sums inside the layers."""
    sites = subject.model.places.sites.canonical
    seen = read(subject, names)
    for name in names:
        yield Check(
            "a site fires", name, "a value", "a value" if name in seen else "nothing", None, name in seen
        )
    plain = witnessed(subject.run, [sites[name] for name in names if has_witness(sites[name])])
    for name in plain.keys() & seen.keys():
        yield equal_bits("captured value = what a plain hook sees", name, seen[name], plain[name])
    modules = projections(list(names), sites)
    yield from layer_sums(seen, sites, outputs_of(subject.run, modules))


def edit_checks(subject: Subject, names: Sequence[str], clean: Mapping[str, Tensor]) -> Iterator[Check]:
    """That an edit at each site changes what comes behind it, and neither the block's input nor another tower."""
    inputs = read(subject, [name for name in names if name.endswith(".resid_pre")])
    for name in names:
        block = _BLOCK.match(name)
        before = f"{block[1]}.resid_pre" if block else ""
        watched = [before] if before in inputs and before != name else []
        with (
            subject.model.hooks(fwd_hooks=[(name, _changed)], strict=False),
            subject.model.caching(watched or name, strict=False) as cache,
        ):
            edited = subject.run()
        own = [output for output in edited if subject.concerned(name, output)]
        if own:
            acts = any(not torch.equal(edited[output], clean[output]) for output in own)
            yield Check(
                "an edit acts downstream", name, "changed", "changed" if acts else "unchanged", None, acts
            )
        for output in edited.keys() - set(own):
            what = "an edit leaves alone what does not read its site"
            yield equal_bits(what, name, edited[output], clean[output])
        for site in watched:
            yield equal_bits("an edit leaves its block's input alone", name, cache[site], inputs[site])


def some_blocks(groups: Sequence[Sequence[str]]) -> list[list[str]]:
    """The groups of which every site is edited: of each stack of blocks the first, the middle and the last one."""
    stacks: dict[str, list[Sequence[str]]] = {}
    kept: list[list[str]] = []
    for group in groups:
        block = _BLOCK.match(group[0])
        if block is None:
            kept.append(list(group))
        else:
            stacks.setdefault(block[1].rpartition(".")[0], []).append(group)
    for stack in stacks.values():
        kept += [list(stack[i]) for i in sorted({0, len(stack) // 2, len(stack) - 1})]
    return kept


def _changed(value: Tensor, *, hook: Any) -> Tensor:
    return 1.5 * value + 0.1
