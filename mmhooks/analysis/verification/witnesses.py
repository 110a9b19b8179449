"""What plain hooks of torch see at the places of sites, without anything of ours in the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from mmhooks.hooks.sites import Site
from mmhooks.hooks.taps import ModuleArgument, ModuleInput, ModuleOutput

Run = Callable[[], Any]


def has_witness(site: Site) -> bool:
    """Whether a site is an input or an output of a module, which a plain hook sees."""
    return isinstance(site.tap, (ModuleOutput, ModuleInput, ModuleArgument))


def witnessed(run: Run, sites: Sequence[Site]) -> dict[str, Tensor]:
    """The values at sites by plain hooks, in one run; several calls of a module are stacked, as caches do."""
    seen: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    with ExitStack() as held:
        for site in sites:
            held.enter_context(_plain_hook(site, seen[site.name]))
        run()
    return {
        name: values[0] if len(values) == 1 else torch.stack(values)
        for name, values in seen.items()
        if values
    }


def outputs_of(run: Run, modules: Sequence[nn.Module]) -> dict[nn.Module, Tensor]:
    """What modules give in one run, several calls stacked."""
    seen: dict[nn.Module, list[Tensor]] = {module: [] for module in modules}
    with ExitStack() as held:
        for module in modules:

            def keep(module: nn.Module, args: Any, output: Any) -> None:
                seen[module].append(_first(output).clone())

            held.enter_context(_removed(module.register_forward_hook(keep)))
        run()
    return {module: v[0] if len(v) == 1 else torch.stack(v) for module, v in seen.items() if v}


@contextmanager
def _plain_hook(site: Site, kept: list[Tensor]) -> Iterator[None]:
    tap: Any = site.tap
    show = site.view.show if site.view else lambda value: value

    def keep(value: Any) -> None:
        kept.append(show(value).detach().clone())

    def output(module: nn.Module, args: Any, given: Any) -> None:
        keep(_first(given))

    def inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(args[0] if args else kwargs[tap.keyword or next(iter(kwargs))])

    def argument(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        at = [*signature(module.forward).parameters].index(tap.argument)
        given = args[at] if at < len(args) else kwargs[tap.argument]
        keep(given[tap.key_in_dict] if tap.key_in_dict else given)

    if isinstance(tap, ModuleOutput):
        handle = tap.owner.register_forward_hook(output)
    else:
        body = inputs if isinstance(tap, ModuleInput) else argument
        handle = tap.owner.register_forward_pre_hook(body, with_kwargs=True)
    with _removed(handle):
        yield


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _first(output: Any) -> Tensor:
    values = tuple(output.values()) if isinstance(output, dict) else output
    return values if isinstance(values, Tensor) else values[0]
