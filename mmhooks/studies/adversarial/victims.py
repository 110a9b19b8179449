"""Victims and judges of the adversarial study, made from its options."""

from __future__ import annotations

from functools import cache
from typing import Any

from mmhooks.analysis.attacks.chat_endpoint import Endpoint
from mmhooks.analysis.attacks.judges import EndpointJudge
from mmhooks.analysis.attacks.victims import EndpointVictim, LlavaVictim, ZeroShotVictim
from mmhooks.errors import MMHooksError
from mmhooks.models.vlm.llava import load_llava
from mmhooks.studies.adversarial.evaluation import Evaluation, rule_judge
from mmhooks.studies.adversarial.options import Options
from mmhooks.studies.adversarial.samples import Samples, labels, make_samples
from mmhooks.studies.common.placement import Placement


def make_evaluations(
    model: Any, pairs: Any, options: Options, *, count: int, seed: int
) -> tuple[Samples, list[Evaluation]]:
    """Makes ``count`` attacked samples, and an evaluation of each victim on them."""
    made = make_samples(
        model, pairs, count, seed=seed, epsilon=options.epsilon, steps=options.attack_steps,
        progress=not options.quiet,
    )  # fmt: skip
    victims = make_victims(options, model, labels(made, pairs, seed))
    return made, [Evaluation(victim, make_judge(options), made) for victim in victims]


def make_victims(options: Options, model: Any, candidates: tuple[str, ...]) -> list[Any]:
    """Makes the victims named by ``--victim``; default: zero-shot CLIP and mini-llava.

    Without candidates this only checks that they exist.

    Raises:
        MMHooksError: an endpoint without an address, or a missing checkpoint.
    """
    found: list[Any] = []
    for name in options.victim or ["clip", "mini-llava"]:
        if name == "clip":
            template = "a drawing of a {}" if options.data == "mini" else "a picture of {}"
            found += [ZeroShotVictim(model, candidates, template)] if candidates else []
        elif name.startswith("endpoint:"):
            what, _, url = name.removeprefix("endpoint:").partition("@")
            if not url:
                raise MMHooksError(f"--victim: expected endpoint:MODEL@URL, got {name!r}")
            found.append(EndpointVictim(Endpoint(what, url, options.victim_key)))
        else:
            found.append(LlavaVictim(cached_llava(name, Placement.of(options))))
    return found


@cache
def cached_llava(name: str, place: Placement) -> Any:
    return load_llava(name, device=place.device, dtype=place.dtype)


def make_judge(options: Options) -> Any:
    """Returns the judge named by ``--judge``: the rules, or a model behind an endpoint."""
    if options.judge == "rules":
        return rule_judge()
    endpoint = Endpoint(options.judge, options.judge_url, options.judge_key)
    return EndpointJudge(endpoint, progress=not options.quiet)
