"""Settings of the generation study: cases, modes, and the spaces whose groups of features are edited."""

from __future__ import annotations

from typing import Any, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor

import mmhooks as mm
from mmhooks.analysis.measures.conditioner_mds import conditioner_mds
from mmhooks.analysis.measures.groups import groups_of
from mmhooks.analysis.statistics.controls import size_matched
from mmhooks.errors import MMHooksError
from mmhooks.models.diffusion.conditioner import conditioner_sides, joint_sides
from mmhooks.models.diffusion.fitted_projection import fit_text_projection
from mmhooks.models.diffusion.joint_directions import JointDirections
from mmhooks.models.diffusion.references import Mode, text_projection
from mmhooks.studies.generation.interpolation import Case, Setting
from mmhooks.studies.generation.options import Options

JOINT = "joint"


def check_options(options: Options) -> None:
    """Checks what typer cannot check, before anything is loaded.

    Raises:
        MMHooksError: an unknown mode, or a prompt to show that is not drawn.
    """
    for one in options.mode or ():
        if one not in get_args(Mode):
            raise MMHooksError(f"--mode: expected one of {', '.join(get_args(Mode))}, got {one!r}")
    some = min(options.curve_pairs, options.pairs)
    if options.shown is not None and not 0 <= options.shown < some:
        raise MMHooksError(
            f"--shown: expected 0 to {some - 1}, the prompts drawn at every strength, got {options.shown}; raise "
            "--curve-pairs for another"
        )


def known_texts(sd: Any) -> set[str] | None:
    """Returns the texts that a pipeline was trained to draw; None if it is not limited to a list."""
    if sd.name != "mini":
        return None
    from mmhooks.models.embedded.mini_sd import drawings

    return {row["name"] for row in drawings()}


def same_size(
    groups: dict[str, mm.FeatureSet], alive: mm.FeatureSet, *, whole: bool, seed: int, sets: int
) -> tuple[dict[str, mm.FeatureSet], tuple[mm.FeatureSet, ...], mm.FeatureSet]:
    """Cuts the groups at random to the smallest one's size, a fifth of the alive features at most, so that twice as many
    are left outside all three for random sets (``whole``: leaves the groups as they are).

    Returns:
        The groups to edit; ``sets`` random ones of TextD's size; and the features these are drawn from, outside all
        edited groups (``whole``: outside TextD, as no feature is outside all three).

    Raises:
        ShapeMismatch: fewer features are outside the groups than a set needs.
    """
    size = min(len(alive) // 5, *(len(g) for g in groups.values()))
    cut = (
        groups
        if whole
        else {k: g if len(g) == size else g.sample(size, seed=seed) for k, g in groups.items()}
    )
    pool = alive - cut["TextD"] if whole else alive - (cut["ImgD"] | cut["TextD"] | cut["CrossD"])
    drawn = tuple(size_matched(cut["TextD"], draws=sets, seed=seed, alive=pool, disjoint=True))
    return cut, drawn, pool


def modes_of(sd: Any, asked: list[str] | None) -> list[Mode]:
    """Returns the modes asked for; else "unclip" if the pipeline takes an image embedding, else the conditioner's."""
    if asked:
        return cast(list[Mode], asked)
    return ["unclip"] if "image.embed" in sd.places.sites.canonical else ["projected", "naive"]


def projection_of(
    sd: Any, clip: Any, pairs: Any, mode: Mode, options: Options
) -> Float[Tensor, "d_cond d_joint"] | None:
    """Returns the projection that references are carried back through, for ``--projection``; None: CLIP's own."""
    if mode != "projected" or options.projection == "last":
        return None
    return fit_text_projection(sd, clip, pairs.texts).matrix


def settings_of(
    sd: Any, clip: Any, pairs: Any, cases: list[Case], mode: Mode, options: Options
) -> tuple[list[Setting], dict[str, str]]:
    """Returns the settings: the space's own dimensions (the paper's), and an SAE trained on them.

    Both are scored in the space that is edited; with ``--joint`` the conditioner's dimensions are also edited at the
    indices that CLIP's joint space is scored at. A space that cannot be split into three groups is returned in a second
    dict, with the reason and its scores.
    """
    seed, progress = options.seed, not options.quiet
    projection = projection_of(sd, clip, pairs, mode, options)
    sides = conditioner_sides(sd, pairs, mode=mode, clip=clip, projection=projection, progress=progress)
    toward = mm.reference(sd, [case.image for case in cases], mode=mode, clip=clip, projection=projection)
    width = sides[0].shape[1]
    torch.manual_seed(seed)
    head = mm.TopKSAE(width, options.features or 4 * width, options.k)
    mm.train_head(head, *sides, epochs=options.epochs, seed=seed, progress=progress)
    head = head.to(sd.device).eval()
    with torch.no_grad():
        spaces = [("dimensions", None, toward), ("SAE", head, head.encode(head.prepare(toward)))]
    site = "image.embed" if mode == "unclip" else "text.cond"
    found, impossible = [], {}
    scored: dict[str, Any] = {}  # spaces whose scores are not of the edited space
    if options.joint and mode != "unclip":  # unclip edits the joint space itself
        scored[JOINT] = joint_sides(pairs, clip, progress=progress)
        if (joint := scored[JOINT][0].shape[1]) == width:  # indices carry over, probably as in the paper
            spaces.append((JOINT, None, toward))
        elif mode == "projected":
            along = JointDirections(text_projection(sd, clip) if projection is None else projection).to(
                sd.device
            )
            spaces.append((JOINT, along, along.encode(toward.float())))
        else:
            impossible[f"{mode}, {JOINT}"] = (
                f"expected as many dimensions as the conditioner's {width}, so that indices carry over, got {joint}; mode "
                "projected edits them as directions"
            )
    for space, scorer, target in spaces:
        # Joint dimensions are scored where they lie, by the embeddings themselves.
        result = conditioner_mds(
            scored.get(space, sides), head=None if space in scored else scorer, data=pairs.name
        )
        try:
            groups, rule = groups_of(result)
        except MMHooksError as error:
            scores = f"scores are {result.mu:.3f} ± {result.sigma:.3f}"
            impossible[f"{mode}, {space}"] = f"{error}; {scores}"
            continue
        alive = mm.FeatureSet(~result.dead, len(result.R), head=result.groups[0].head)
        edited, drawn, pool = same_size(
            groups, alive, whole=options.whole, seed=seed, sets=options.random_sets
        )
        sizes = {name: len(g) for name, g in groups.items()}
        edited["random"] = drawn[0]
        found.append(Setting(space, site, edited, drawn, len(pool), sizes, rule, target, result, scorer))
    return found, impossible
