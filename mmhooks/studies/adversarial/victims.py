"""Victims and judges of the adversarial study, made from its options."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

from mmhooks.analysis.attacks.chat_endpoint import Endpoint
from mmhooks.analysis.attacks.judges import EndpointJudge, deepseek_judge
from mmhooks.analysis.attacks.victims import EndpointVictim, LlavaVictim, ZeroShotVictim
from mmhooks.errors import MMHooksError, MMHooksWarning
from mmhooks.models.vlm.llava import load_llava
from mmhooks.models.vlm.model import ANSWER_TOKENS
from mmhooks.studies.adversarial.evaluation import Evaluation, rule_judge
from mmhooks.studies.adversarial.options import DEFAULT_VICTIMS, Options
from mmhooks.studies.adversarial.samples import Samples, labels, make_samples
from mmhooks.studies.common.placement import AUTO, Placement


def make_evaluations(
    model: Any, pairs: Any, options: Options, *, count: int, seed: int
) -> tuple[Samples, list[Evaluation]]:
    """Makes ``count`` attacked samples, and an evaluation of each victim on them."""
    made = make_samples(
        model, pairs, count, seed=seed, epsilon=options.epsilon, steps=options.attack_steps,
        phrases=(options.phrase, options.friendly_phrase) if options.phrase else None, progress=not options.quiet,
    )  # fmt: skip
    victims = make_victims(options, model, labels(made, pairs, seed))
    return made, [Evaluation(victim, make_judge(options), made) for victim in victims]


def make_victims(options: Options, model: Any, candidates: tuple[str, ...]) -> list[Any]:
    """Makes the victims named by ``--victim``; default: zero-shot CLIP and mini-vlm.

    Without candidates this only checks that they exist.

    Raises:
        MMHooksError: an endpoint without an address or a key, or a missing checkpoint.
    """
    found: list[Any] = []
    for name in options.victim or DEFAULT_VICTIMS:
        if name == "clip":
            template = "a drawing of a {}" if options.data == "mini" else "a picture of {}"
            found += [ZeroShotVictim(model, candidates, template)] if candidates else []
        elif name.startswith("endpoint:"):
            what, _, url = name.removeprefix("endpoint:").partition("@")
            if not url:
                raise MMHooksError(f"--victim: expected endpoint:MODEL@URL, got {name!r}")
            limit = {"temperature": 0, "max_tokens": options.answer_tokens or ANSWER_TOKENS}
            endpoint = Endpoint(what, url, options.victim_key, options=limit)
            endpoint.require_key()
            found.append(EndpointVictim(endpoint))
        else:
            llava = cached_llava(name, Placement.of(options), options.victim_dtype)
            found.append(LlavaVictim(llava, options.answer_tokens))
    return found


@cache
def cached_llava(name: str, place: Placement, dtype: str) -> Any:
    return load_llava(name, device=place.device, dtype=None if dtype == AUTO else dtype)


def make_judge(options: Options) -> Any:
    """Returns the judge named by ``--judge``: the rules, the paper's, or another model behind an endpoint.

    Raises:
        EndpointError: an address or a key that cannot be used, or no key.
    """
    if options.judge == "rules":
        return rule_judge()
    where, progress = (options.judge_url, options.judge_key), not options.quiet
    if options.judge == "deepseek":
        judge = deepseek_judge(*where, progress=progress)
    else:
        judge = EndpointJudge(Endpoint(options.judge, *where), progress)
    judge.endpoint.require_key()
    return judge


def answer_lengths(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """Returns the limit of tokens of each victim that generates, and how many of its answers the limit cut; warns where
    it cut any: a judge then saw the beginning of an answer for the whole."""
    found = {
        e.victim.name: {"limit": e.victim.answer_tokens, "asked": len(e.victim.cut), "cut": sum(e.victim.cut)}
        for e in evaluations
        if hasattr(e.victim, "cut")
    }
    for name, told in found.items():
        if told["cut"]:
            warnings.warn(
                f"{told['cut']} of {told['asked']} answers of {name} were cut at {told['limit']} tokens and judged as "
                "they are; give a larger --answer-tokens",
                MMHooksWarning,
                stacklevel=2,
            )
    return found
