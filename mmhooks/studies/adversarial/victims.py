"""Who is attacked and who judges: the victims asked for, with the samples that they are shown."""

from __future__ import annotations

from functools import cache
from typing import Any

from mmhooks.analysis.attacks.chat_endpoint import Endpoint
from mmhooks.analysis.attacks.judges import EndpointJudge
from mmhooks.analysis.attacks.victims import EndpointVictim, LlavaVictim, ZeroShotVictim
from mmhooks.errors import MMHooksError
from mmhooks.models.vlm.llava import load_llava
from mmhooks.studies.adversarial.bench import Bench, rule_judge
from mmhooks.studies.adversarial.options import Options
from mmhooks.studies.adversarial.samples import Samples, labels, make


def make_benches(
    model: Any, pairs: Any, options: Options, *, count: int, seed: int
) -> tuple[Samples, list[Bench]]:
    """``count`` attacked samples, and a bench on which each victim is asked about them."""
    made = make(
        model, pairs, count, seed=seed, epsilon=options.epsilon, steps=options.attack_steps,
        progress=not options.quiet,
    )  # fmt: skip
    victims = victims_of(options, model, labels(made, pairs, seed))
    return made, [Bench(victim, judge_of(options), made) for victim in victims]


def victims_of(options: Options, model: Any, candidates: tuple[str, ...]) -> list[Any]:
    """The victims asked for; default: zero-shot CLIP and mini-llava. Without candidates they are only looked up.

    Raises:
        MMHooksError: an endpoint without an address, or a checkpoint that is not there.
    """
    found: list[Any] = []
    for name in options.victim or ["clip", "mini-llava"]:
        if name == "clip":
            template = "a drawing of a {}" if options.data == "mini" else "a picture of {}"
            found += [ZeroShotVictim(model, candidates, template)] if candidates else []
        elif name.startswith("endpoint:"):
            what, _, url = name.removeprefix("endpoint:").partition("@")
            if not url:
                raise MMHooksError(f"--victim: an endpoint is endpoint:MODEL@URL, got {name!r}")
            found.append(EndpointVictim(Endpoint(what, url, options.victim_key)))
        else:
            found.append(LlavaVictim(llava_of(name)))
    return found


@cache
def llava_of(name: str) -> Any:
    return load_llava(name)


def judge_of(options: Options) -> Any:
    """The rules, or a model behind an endpoint."""
    if options.judge == "rules":
        return rule_judge()
    endpoint = Endpoint(options.judge, options.judge_url, options.judge_key)
    return EndpointJudge(endpoint, progress=not options.quiet)
