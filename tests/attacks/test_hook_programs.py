"""Attack on the hooks: random programs, interrupts, cancellations, threads, and every algorithm that opens contexts.

What must hold after each: outputs bit-equal to those from before, no hook, class, attribute or tap left on the model,
no context left in any thread. What must hold inside: a write in place is what returning the written tensor is, other
threads and copies see nothing, order is by context whoever wraps the model.
"""

from __future__ import annotations

import asyncio
import copy
import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hooks.conftest import fingerprint, tiny_clip
from models.families import FAMILIES

import mmhooks as mm
from mmhooks.errors import MMHooksError
from mmhooks.hooks.dispatch import active, registry
from mmhooks.models.clip.sites import example_inputs

MODES: list[Callable[[], Any]] = [torch.no_grad, torch.inference_mode, torch.enable_grad]
SOME = ["CLIP", "custom blocks", "EVA", "BERT", "NLLB"]


class Boom(Exception):
    pass


class Victim:
    """A model, its inputs, its clean outputs, and what it looked like."""

    def __init__(self, model: Any, inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.model = mm.HookedCLIP(model.eval().requires_grad_(False))
        self.inputs = inputs
        width = int(self.model.encode_image(inputs[0]).shape[-1])
        self.sae = mm.TopKSAE(width, 32, 4, seed=3)
        self.other = mm.HookedCLIP(model)  # a second wrapper around the one model
        for hooked in (self.model, self.other):
            hooked.attach(self.sae, at=["image.embed", "text.embed"])
        self.sites = self.model.sites()
        self.clean = self.outputs()
        self.before = fingerprint(model)

    def outputs(self) -> list[torch.Tensor]:
        with torch.no_grad():
            return [self.model.encode_image(self.inputs[0]), self.model.encode_text(self.inputs[1])]

    def check(self) -> None:
        assert fingerprint(self.model.model) == self.before
        assert len(registry) == 0 and not active.get().contexts
        assert all(torch.equal(a, b) for a, b in zip(self.outputs(), self.clean, strict=True))


@cache
def victim(family: str) -> Victim:
    torch.manual_seed(0)
    if family == "tiny":
        return Victim(tiny_clip(), (torch.randn(2, 3, 16, 16), torch.randint(1, 31, (2, 6))))
    model = FAMILIES[family]().eval()
    return Victim(model, example_inputs(model, batch=2))


# -- random programs -------------------------------------------------------------------------------------


def returning(t: torch.Tensor, *, hook: Any) -> torch.Tensor:
    new = t.clone()
    new[..., :1] = 0.5
    return new


def writing(t: torch.Tensor, *, hook: Any) -> torch.Tensor | None:
    t[..., :1] = 0.5
    return None if len(hook.name) % 2 else t


def boom(t: torch.Tensor, *, hook: Any) -> None:
    raise Boom(hook.name)


def opened(hooked: mm.HookedCLIP, kind: str, site: str, write: Any) -> Any:
    match kind:
        case "edit":
            return hooked.hooks(mm.Steer([0], at=site, strength=0.5), strict=False)
        case "mask":
            return hooked.hooks(mask=range(16), strict=False)
        case "write":
            return hooked.hooks(fwd_hooks=[(site, write)], strict=False)
        case "read":
            return hooked.hooks(fwd_hooks=[(site, lambda t, *, hook: None)], strict=False)
        case "backward":
            return hooked.hooks(bwd_hooks=[(site, lambda g, *, hook: None)], strict=False)
        case "boom":
            return hooked.hooks(fwd_hooks=[(site, boom)], strict=False)
        case "unknown":
            return hooked.hooks(mm.Zero(at=site), mm.Zero(at="nowhere"))
        case "strict":
            return hooked.caching([site])
    return hooked.caching([site, "image.embed"], strict=False)


def program(seed: int, it: Victim, write: Any) -> list[torch.Tensor]:
    """One random program; gives everything that it computed. The same seed, the same program."""
    dice = random.Random(seed)
    seen: list[torch.Tensor] = []
    contexts: list[Any] = []
    kinds = ["edit", "mask", "write", "write", "read", "backward", "boom", "unknown", "strict", "cache"]
    for _ in range(dice.randint(3, 9)):
        step, mode = (
            dice.choice(["open", "open", "open", "close", "image", "text", "thread", "copy"]),
            dice.choice(MODES),
        )
        kind, site, where = dice.choice(kinds), dice.choice(it.sites), dice.random()
        try:
            if step == "open":
                with mode():
                    context = opened(it.model if dice.random() < 0.7 else it.other, kind, site, write)
                    given = context.__enter__()
                contexts.append(context)
                if isinstance(given, mm.ActivationCache):
                    seen.append(given)  # type: ignore[arg-type]
            elif step == "close" and contexts:
                contexts.pop(int(where * len(contexts))).__exit__(None, None, None)
            elif step in ("image", "text"):
                with mode():
                    run = it.model.encode_image if step == "image" else it.other.encode_text
                    seen.append(run(it.inputs[step == "text"]).detach())
            elif step == "thread":
                found: list[torch.Tensor] = []
                thread = threading.Thread(target=lambda found=found: found.extend(it.outputs()))
                thread.start()
                thread.join()
                assert all(torch.equal(a, b) for a, b in zip(found, it.clean, strict=True))
            elif step == "copy" and where < 0.2:
                with torch.no_grad():
                    assert torch.equal(copy.deepcopy(it.model.model).encode_image(it.inputs[0]), it.clean[0])
        except (Boom, MMHooksError):
            pass
    for context in contexts:
        with suppress(Boom):
            context.__exit__(Boom, Boom(), None)
    return [t for given in seen for t in ([given] if isinstance(given, torch.Tensor) else given.values())]


def test_random_programs(rounds):
    """Half on the tiny CLIP, half on families with other blocks; each is run writing in place and returning."""
    dice = random.Random(0)
    for seed in range(rounds(30)):
        it = victim("tiny" if dice.random() < 0.7 else dice.choice(SOME))
        written, returned = program(seed, it, writing), program(seed, it, returning)
        assert len(written) == len(returned), seed
        assert all(torch.equal(a, b) for a, b in zip(written, returned, strict=True)), seed
        it.check()


def test_order_is_by_context_whoever_wraps(rounds):
    """Random nestings over two wrappers of one model: every site sees the hooks in the order of the contexts."""
    it, dice = victim("tiny"), random.Random(1)
    for _ in range(rounds(3)):
        site = dice.choice(it.sites)
        seen: list[int] = []
        with ExitStack() as stack:
            for number in range(dice.randint(2, 5)):
                hooked = dice.choice([it.model, it.other])
                note = [(site, lambda t, *, hook, number=number, seen=seen: seen.append(number))]
                stack.enter_context(hooked.hooks(fwd_hooks=note, strict=False))
            it.model.forward(*it.inputs)
        assert seen == sorted(set(seen)) and len(seen) >= 2, site
    it.check()


def test_threads_at_every_switch(rounds):
    """Threads that open, run and close with the interpreter switching as often as it can."""
    it, faults = victim("tiny"), []

    def work(which: int) -> None:
        dice = random.Random(which)
        try:
            for n in range(rounds(20)):
                site = dice.choice(
                    ["image.blocks.0.attn.z", "image.pooled", "image.embed", "image.blocks.1.resid_mid"]
                )
                with torch.no_grad(), it.model.hooks(mm.Zero(at="image.embed")), it.other.caching(site):
                    if it.model.encode_image(it.inputs[0]).any():
                        faults.append((which, n))
                with torch.no_grad():
                    if not torch.equal(it.model.encode_image(it.inputs[0]), it.clean[0]):
                        faults.append((which, n, "not clean"))
        except BaseException as fault:
            faults.append(fault)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        [t.start() for t in threads]
        [t.join() for t in threads]
    finally:
        sys.setswitchinterval(interval)
    assert not faults
    it.check()


# -- interrupts ------------------------------------------------------------------------------------------

WATCHED = (
    str(Path(mm.__file__).parent),
    "contextlib.py",
    str(Path(torch.__file__).parent / "utils" / "hooks.py"),
)


def interrupted(run: Callable[[], None], at: int) -> int:
    """Runs with a KeyboardInterrupt at the ``at``-th operation of ours or of what we call; gives how many there were."""
    count = 0

    def trace(frame: Any, event: str, arg: Any) -> Any:
        nonlocal count
        if not any(part in frame.f_code.co_filename for part in WATCHED):
            return None
        frame.f_trace_opcodes = True
        if event in ("opcode", "call", "line"):
            count += 1
            if count == at:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return count


def uses(it: Victim) -> dict[str, Callable[[], Any]]:
    return {
        "edit": lambda: it.model.hooks(mm.Zero([0], at="image.embed"), strict=False),
        "inside attention": lambda: it.model.hooks(mm.Zero([0], at="image.blocks.*.attn.z"), strict=False),
        "a product": lambda: it.model.hooks(fwd_hooks=[("image.pooled", writing)], strict=False),
        "mask": lambda: it.model.hooks(mask=range(8), strict=False),
        "cache": lambda: it.model.caching("image.blocks.*.resid_post", strict=False),
        "inputs": lambda: it.model.hooks(mm.Zero([0], at="image.blocks.*.resid_pre"), strict=False),
        "backward": lambda: it.model.hooks(
            bwd_hooks=[("image.blocks.*", lambda g, *, hook: None)], strict=False
        ),
    }


@pytest.mark.parametrize("use", uses(None))  # type: ignore[arg-type]
def test_interrupts_at_every_operation(use, rounds):
    """While a context opens, runs or closes, alone and inside another one, which goes on unharmed."""
    it, dice = victim("tiny"), random.Random(use)
    for number in range(rounds(2)):
        nested, forward = number % 2 == 1, dice.random() < 0.2

        def run(forward: bool = forward) -> None:
            with uses(it)[use]():
                if forward:
                    it.model.encode_image(it.inputs[0])

        with (
            torch.no_grad(),
            it.other.hooks(mm.Zero(at="image.embed"), strict=False) if nested else nullcontext(),
        ):
            total = interrupted(run, -1)
            interrupted(run, dice.randint(1, total))
            if nested:
                assert not it.model.encode_image(it.inputs[0]).any()
                assert len(active.get().contexts) == 1 and len(registry) == 1
        it.check()


@pytest.mark.parametrize(
    "site", ["image.blocks.0.resid_pre", "image.embed", "image.pooled", "image.blocks.0.attn.z"]
)
def test_interrupts_at_each_operation_of_closing(site):
    """One tap of each kind: no operation is left out."""
    it = victim("tiny")

    def opens() -> None:
        held.append(it.model.hooks(mm.Zero([0], at=site), strict=False))
        held[0].__enter__()

    def whole() -> None:
        with it.model.hooks(mm.Zero([0], at=site), strict=False):
            pass

    held: list[Any] = []
    before = interrupted(opens, -1)
    held.pop().__exit__(None, None, None)
    for at in range(before, interrupted(whole, -1) + 1):
        interrupted(whole, at)
        assert (
            fingerprint(it.model.model) == it.before and len(registry) == 0 and not active.get().contexts
        ), at
    it.check()


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs timers that send signals")
def test_interrupts_by_signals(rounds):
    """Ctrl-C at a moment that nobody chose."""
    it, dice = victim("tiny"), random.Random(2)
    hits = 0

    def press(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, press)
    try:
        for _ in range(rounds(5)):
            use = dice.choice([*uses(it)])
            try:
                signal.setitimer(signal.ITIMER_REAL, dice.uniform(2e-5, 1e-3))
                until = time.monotonic() + 1  # Python drops an interrupt that comes in a finaliser
                while time.monotonic() < until:
                    with uses(it)[use]():
                        pass
            except KeyboardInterrupt:
                hits += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            it.check()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert hits >= 0.9 * rounds(5)


def test_cancelled_tasks(rounds):
    """Tasks that hold contexts over awaits, cancelled at any of them; those that go on see their own edits."""
    it, dice = victim("tiny"), random.Random(3)

    async def work(dimension: int) -> bool:
        with torch.no_grad(), it.model.hooks(mm.Zero([dimension], at="image.embed"), strict=False):
            for _ in range(3):
                await asyncio.sleep(0)
                with it.other.caching("image.blocks.0.attn.z", strict=False):
                    await asyncio.sleep(0)
                    z = it.model.encode_image(it.inputs[0])
                    changed = {n for n in range(z.shape[-1]) if not torch.equal(z[:, n], it.clean[0][:, n])}
                    assert changed == {dimension}
        return True

    async def main() -> None:
        tasks = [asyncio.create_task(work(n)) for n in range(4)]
        for _ in range(dice.randint(0, 8)):
            await asyncio.sleep(0)
            if dice.random() < 0.4:
                dice.choice(tasks).cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert result is True or isinstance(result, asyncio.CancelledError), result

    for _ in range(rounds(5)):
        asyncio.run(main())
        it.check()


# -- every algorithm that opens contexts: a normal run, a bad target, a module that raises ---------------


def algorithms() -> dict[str, tuple[Callable[..., Any], Callable[..., Any]]]:
    """Name -> a normal run and one that asks for what is not there, both of ``(model, pixels)``."""
    from mmhooks.analysis.attribution.saliency import (
        gradient_attention,
        legrad,
        raw_attention,
        rollout,
        token_contributions,
    )
    from mmhooks.analysis.decomposition.dataset import head_outputs
    from mmhooks.analysis.decomposition.second_order import second_order
    from mmhooks.analysis.interventions.mean_ablation import site_means

    def directions(n: int) -> torch.Tensor:
        return torch.ones(n, 12)

    def maps(method: Any) -> tuple[Any, Any]:
        return (lambda m, x: method(m, x, directions(2)), lambda m, x: method(m, x, directions(3)))

    nothing = ["nowhere"]
    return {
        "run_with_cache": (lambda m, x: m.run_with_cache(x, sites="image.*"), lambda m, x: m.run_with_cache(x, sites=nothing)),
        "run_with_hooks": (
            lambda m, x: m.run_with_hooks(x, fwd_hooks=[("image.embed", writing)]),
            lambda m, x: m.run_with_hooks(x, fwd_hooks=[("nowhere", writing)]),
        ),
        "TransformerLens": (
            lambda m, x: m.as_transformer_lens().run_with_cache(x, names_filter=["image.embed"]),
            lambda m, x: m.as_transformer_lens().run_with_hooks(x, fwd_hooks=[("nowhere", writing)]),
        ),
        "nnsight": (lambda m, x: m.as_nnsight("image.embed")(x), lambda m, x: m.as_nnsight(nothing)),
        "decompose": (lambda m, x: mm.decompose(m, x), lambda m, x: mm.decompose(m, x, against=torch.ones(1, 7))),
        "head_outputs": (lambda m, x: head_outputs(m, x, layers=[0]), lambda m, x: head_outputs(m, x, layers=[9])),
        "second_order": (lambda m, x: second_order(m, x, layer=0), lambda m, x: second_order(m, x, layer=9)),
        "site_means": (
            lambda m, x: site_means(m, x, ["image.blocks.0.attn.z"]),
            lambda m, x: site_means(m, x, nothing),
        ),
        "raw_attention": maps(raw_attention),
        "rollout": maps(rollout),
        "token_contributions": maps(token_contributions),
        "gradient_attention": maps(gradient_attention),
        "legrad": maps(legrad),
    }  # fmt: skip


class Raises(torch.nn.Identity):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise Boom


@pytest.mark.parametrize("name", algorithms())
def test_every_algorithm_leaves_the_model_as_it_was(name):
    """As captum tests its own: a normal run, a bad target, a module that raises."""
    normal, bad = algorithms()[name]
    it = Victim(tiny_clip(), (torch.randn(2, 3, 16, 16), torch.randint(1, 31, (2, 6))))
    normal(it.model, it.inputs[0])
    it.check()
    with pytest.raises(Exception) as caught:
        bad(it.model, it.inputs[0])
    del caught
    it.check()
    block: Any = it.model.model.visual.transformer.resblocks[1]  # type: ignore[union-attr]
    sound, block.mlp.gelu = block.mlp.gelu, Raises()
    with pytest.raises(Exception) as caught:
        normal(it.model, it.inputs[0])
    del caught
    block.mlp.gelu = sound
    it.check()


def test_a_dropped_context_closes():
    it = victim("tiny")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        it.model.hooks(mm.Zero(at="image.embed")).__enter__()
    assert any("garbage-collected" in str(w.message) for w in told)
    it.check()
