"""``mm.hook``: the one entrance for any model. Families know their models and hook them; others register through packages.

A package registers a family under the entry-point group ``mmhooks.families``, in its ``pyproject.toml``::

    [project.entry-points."mmhooks.families"]
    mine = "my_package.families:MINE"

``MINE`` has the two methods of :class:`Family`. Registered families are asked before the built-in ones.
"""

from __future__ import annotations

import warnings
from importlib.metadata import entry_points
from typing import Any, Protocol, runtime_checkable

from torch import nn

from mmhooks.errors import MMHooksError, MMHooksWarning
from mmhooks.models.hooked import HookedModel
from mmhooks.models.processing import check_parts, tokenizer_of

GROUP = "mmhooks.families"


@runtime_checkable
class Family(Protocol):
    """A kind of models."""

    def matches(self, model: Any) -> bool:
        """Whether ``model`` is one of them; of any object, without raising."""
        ...

    def hook(self, model: Any, **options: Any) -> Any:
        """The hooked model; ``options`` are those that the caller of ``mm.hook`` gave, ``processor`` among them."""
        ...


def hook(model: Any, processor: Any = None, *, name: str = "", **options: Any) -> Any:
    """Hooks any model by the class that fits it; the model object itself stays as it is.

    Args:
        model: a dual encoder or vision encoder of open_clip, transformers, timm or torchvision, a vision-language model of
            transformers, a diffusers pipeline, a model of a registered family, or any other ``torch.nn.Module``.
        processor: of transformers, ``AutoProcessor.from_pretrained``: its image processor becomes ``preprocess``, its
            tokenizer ``tokenizer``. For a vision encoder also a function from an image to pixels.
        name: for messages and manifests.
        options: of the class: ``tokenizer, preprocess, autocast`` of :class:`~mmhooks.models.clip.model.HookedCLIP`.

    Returns:
        :class:`~mmhooks.models.clip.model.HookedCLIP`, :class:`~mmhooks.models.vision.model.HookedVision`,
        :class:`~mmhooks.models.vlm.model.HookedVLM`, :class:`~mmhooks.models.diffusion.model.HookedDiffusion`, what a
        registered family makes, or, with a warning, a plain :class:`~mmhooks.models.hooked.HookedModel` whose sites are
        native module paths.

    Raises:
        MMHooksError: no module and no pipeline; a processor that does not fit the model; options that its class does not
            take; a registered family that cannot be loaded.

    >>> import mmhooks as mm
    >>> mm.hook(mm.load("mini").model)
    HookedCLIP(CLIP, heads: none)
    """
    given = {"processor": processor, "name": name or None, **options}
    given = {key: value for key, value in given.items() if value is not None}
    for family in (*registered(), *BUILT_IN):
        if family.matches(model):
            return _hooked(family, model, given)
    if not isinstance(model, nn.Module):
        raise MMHooksError(
            f"mm.hook: expected a torch.nn.Module or a diffusers pipeline, got {type(model).__name__}; give the module "
            "inside it, for example its .model"
        )
    if given.keys() - {"name"}:
        raise MMHooksError(
            f"mm.hook: {type(model).__name__} is of no known family, so {', '.join(given.keys() - {'name'})} would go "
            "unused; leave it out, or register a family that takes it (mmhooks.models.families)"
        )
    warnings.warn(
        f"mm.hook: {type(model).__name__} is of no known family{_near(model)}, so its sites are its native module paths; "
        "mm.HookedModel(model) says so without this warning, and a package can register a family for it "
        "(mmhooks.models.families)",
        MMHooksWarning,
        stacklevel=2,
    )
    return HookedModel(model, name=name)


def _near(model: Any) -> str:
    """What a model of no family is next to, for the warning."""
    if hasattr(model, "peft_config") and callable(getattr(model, "get_base_model", None)):
        inner = type(model.get_base_model()).__name__
        return (
            f" (PEFT's wrapper; mm.hook(model.get_base_model()) hooks the {inner} in which its adapters are)"
        )
    if hasattr(getattr(model, "config", None), "vision_config") and hasattr(model, "generate"):
        from mmhooks.models.vlm.parts import LAYOUTS

        return f" (vision-language models are known of the types {', '.join(LAYOUTS)})"
    return ""


def registered() -> list[Family]:
    """The families of installed packages.

    Raises:
        MMHooksError: one that cannot be imported, or lacks a method; names its package.
    """
    found = []
    for entry in entry_points(group=GROUP):
        package = entry.dist.name if entry.dist is not None else entry.module
        try:
            family = entry.load()
        except Exception as fault:
            raise MMHooksError(
                f"family {entry.name!r} of the package {package!r} cannot be loaded ({type(fault).__name__}: {fault}); "
                "repair or uninstall that package"
            ) from fault
        if not isinstance(family, Family):
            raise MMHooksError(
                f"family {entry.name!r} of the package {package!r}: expected an object with matches(model) and "
                f"hook(model, **options), got {type(family).__name__}"
            )
        found.append(family)
    return found


def _hooked(family: Family, model: Any, options: dict[str, Any]) -> Any:
    try:
        return family.hook(model, **options)
    except TypeError as fault:
        if "unexpected keyword argument" not in str(fault):
            raise
        raise MMHooksError(f"mm.hook of a {type(model).__name__}: {fault}; leave it out") from fault


# -- built-in families ---------------------------------------------------------------------------------------


class _Diffusion:
    """Pipelines of diffusers."""

    def matches(self, model: Any) -> bool:
        return hasattr(model, "components") and hasattr(model, "scheduler") and callable(model)

    def hook(self, model: Any, **options: Any) -> Any:
        from mmhooks.models.diffusion.model import HookedDiffusion

        return HookedDiffusion(model, **options)


class _Dual:
    """Dual encoders."""

    def matches(self, model: Any) -> bool:
        from mmhooks.models.clip.model import dual_encoder_of

        return isinstance(model, nn.Module) and dual_encoder_of(model) is not None

    def hook(self, model: Any, processor: Any = None, **options: Any) -> Any:
        from mmhooks.models.clip.model import HookedCLIP

        hooked = HookedCLIP(model, **options)
        if processor is not None:
            config = getattr(model, "config", None)
            if config is None:
                raise MMHooksError(
                    f"processor: {type(model).__name__} is open_clip's and takes no processor of transformers; give "
                    "tokenizer= and preprocess="
                )
            length, vocabulary = hooked.family.text_length(model), config.text_config.vocab_size
            parts = {
                "tokenizer": tokenizer_of(processor, length, vocabulary),
                "preprocess": hooked.family.preprocess_of(model, processor),
            }
            check_parts(processor, **parts)
            hooked.tokenizer = hooked.tokenizer or parts["tokenizer"]
            hooked.preprocess = hooked.preprocess or parts["preprocess"]
        return hooked


class _Vision:
    """Encoders of images or of videos alone."""

    def matches(self, model: Any) -> bool:
        from mmhooks.models.vision.encoders import vision_encoder_of

        return isinstance(model, nn.Module) and vision_encoder_of(model) is not None

    def hook(self, model: Any, processor: Any = None, **options: Any) -> Any:
        from mmhooks.models.vision.model import HookedVision

        hooked = HookedVision(model, **options)
        if processor is not None:
            made = hooked.family.preprocess_of(model, processor)
            check_parts(processor, preprocess=made)
            hooked.preprocess = hooked.preprocess or made
        return hooked


class _VLM:
    """Models that write text about images."""

    def matches(self, model: Any) -> bool:
        from mmhooks.models.vlm.parts import vlm_parts

        return isinstance(model, nn.Module) and vlm_parts(model) is not None

    def hook(self, model: Any, processor: Any = None, **options: Any) -> Any:
        from mmhooks.models.vlm.model import HookedVLM

        return HookedVLM(model, processor, **options)


BUILT_IN: tuple[Family, ...] = (_Diffusion(), _VLM(), _Dual(), _Vision())
