"""Loading by name: the embedded models, any open_clip name and tag, and checkpoints of transformers and timm."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload
from warnings import catch_warnings, filterwarnings

from mmhooks.errors import MissingWeights, MMHooksError
from mmhooks.models.foreign_code import no_foreign_code
from mmhooks.utils.assets import EMBEDDED, EMBEDDED_VLMS, check_not_replaced

if TYPE_CHECKING:
    import torch

    from mmhooks.models.clip.activation import Activation
    from mmhooks.models.clip.model import HookedCLIP
    from mmhooks.models.vlm.model import HookedVLM

PRECISIONS = ("fp32", "bf16", "fp16", "pure_bf16", "pure_fp16", "amp", "amp_bf16", "amp_bfloat16")


@overload
def load(
    name: Literal["mini", "mini-declip", "mini-reader"] = "mini",
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device = "cpu",
) -> HookedCLIP: ...
@overload
def load(
    name: Literal["mini-vlm"],
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device = "cpu",
) -> HookedVLM: ...
@overload
def load(
    name: str,
    *,
    pretrained: str | None = None,
    precision: str = "fp32",
    dtype: torch.dtype | str | None = None,
    activation: Activation | None = None,
    device: str | torch.device = "cpu",
    cache_dir: str | Path | None = None,
) -> Any: ...
def load(
    name: str = "mini",
    *,
    pretrained: str | None = None,
    precision: str = "fp32",
    dtype: torch.dtype | str | None = None,
    activation: Activation | None = None,
    device: str | torch.device = "cpu",
    cache_dir: str | Path | None = None,
) -> Any:
    """A hooked model by name, in evaluation mode, with its tokenizer and preprocessing.

    Args:
        name: ``"mini"``, ``"mini-declip"``, ``"mini-reader"`` or ``"mini-vlm"`` (embedded, no network);
            any name of ``open_clip.list_models()``, or open_clip's ``"hf-hub:…"``; ``"hf:…"``: a checkpoint of
            transformers, a folder that ``save_pretrained`` wrote or a Hub name; ``"timm:…"``: a name of
            ``timm.list_models()``, with its weights.
        pretrained: for open_clip names, a tag of ``open_clip.list_pretrained()`` or the path of a local
            checkpoint, one of DeCLIP's own included (:mod:`mmhooks.models.clip.declip`: its embedding width, activation,
            tokenizer and preprocessing come with it). None or "" gives random weights, which open_clip itself warns about.
            For ``"hf:…"`` a revision of the Hub's repository, for ``"timm:…"`` a checkpoint file; None: the published weights;
            "": random weights of that architecture.
        precision: open_clip's: ``"fp32"``; ``"bf16"``, ``"fp16"`` (weights of linear and convolution layers);
            ``"pure_bf16"``, ``"pure_fp16"`` (all weights); ``"amp"``, ``"amp_bf16"`` (weights in fp32, run under
            ``torch.autocast``, which is how ``encode_image`` and ``encode_text`` of the hooked model run then).
            The embedded models are stored in half precision and computed in fp32.
        dtype: of all weights, instead of ``precision=``, for open_clip's models and the embedded ones alike:
            ``torch.bfloat16`` is what open_clip calls ``"pure_bf16"``.
        activation: ``"gelu"`` or ``"quick_gelu"``, for a local checkpoint of an open_clip model. By default a tag's is
            what open_clip's table says (``"openai"``: QuickGELU, whatever the configuration says), a file's is the
            configuration's: ``"ViT-B-32"`` has GELU, ``"ViT-B-32-quickgelu"`` QuickGELU.
        cache_dir: where downloads are kept.

    Returns:
        A :class:`~mmhooks.models.clip.model.HookedCLIP`; for ``"mini-vlm"`` a
        :class:`~mmhooks.models.vlm.model.HookedVLM`; for ``"hf:…"`` and ``"timm:…"`` whichever class :func:`mmhooks.hook`
        picks.

    Raises:
        MissingWeights: the tag cannot be fetched or the file is not there.
        MMHooksError: no such model or tag; the message names near ones. A model that is no longer shipped. A file of OpenAI's
            that would get GELU.
        DamagedFile: a checkpoint of DeCLIP's with a key too many, too few or of another shape; names it.

    >>> model = load("mini")
    >>> model.encode_text(model.tokenizer(["a red panda"])).shape
    torch.Size([1, 256])
    """
    from mmhooks.models.clip.model import HookedCLIP
    from mmhooks.models.embedded.mini import load_embedded
    from mmhooks.models.load_options import plain_dtype, take_dtype

    weights = plain_dtype(take_dtype(dtype, {}), "a CLIP")
    if dtype is not None and precision != "fp32":
        raise MMHooksError(
            f"expected dtype= or precision=, got dtype={weights} and precision={precision!r}: both set the type of the "
            "weights; give one"
        )
    if precision not in PRECISIONS:  # open_clip would silently run fp32
        raise MMHooksError(f"expected precision= one of {', '.join(PRECISIONS)}, got {precision!r}")
    if name.startswith(("hf:", "timm:")):
        from mmhooks.models.library_checkpoints import load_timm, load_transformers

        if precision != "fp32" or activation is not None:
            raise MMHooksError(
                f"{name!r} takes no precision= or activation=, which are open_clip's, got {precision!r} and {activation!r}; "
                "dtype= sets the type of the weights"
            )
        kind, _, source = name.partition(":")
        loader = load_transformers if kind == "hf" else load_timm
        given = None if dtype is None else weights
        return loader(source, pretrained=pretrained, dtype=given, device=device, cache_dir=cache_dir)
    pretrained = pretrained or None  # a command line cannot say None, but --pretrained ""
    check_not_replaced(name)
    if name in (*EMBEDDED, *EMBEDDED_VLMS):
        if pretrained is not None or precision != "fp32" or activation is not None:
            raise MMHooksError(
                f"{name!r} is embedded: it takes no pretrained=, precision= or activation=, got {pretrained!r}, {precision!r} "
                f"and {activation!r}; dtype= converts its weights"
            )
        if name in EMBEDDED_VLMS:
            from mmhooks.models.vlm.llava import load_llava

            return load_llava(name, device=device, dtype=weights)
        model, tokenizer, preprocess = load_embedded(name)
    else:
        model, tokenizer, preprocess = _open_clip(name, pretrained, precision, activation, cache_dir)
    model = model.to(device, weights if dtype is not None else None).eval()
    return HookedCLIP(
        model, tokenizer=tokenizer, preprocess=preprocess, name=name, autocast=_autocast(precision)
    )


def _autocast(precision: str) -> torch.dtype | None:
    """What open_clip trains and evaluates a precision under; None: nothing."""
    import torch

    return {"amp": torch.float16, "amp_bf16": torch.bfloat16, "amp_bfloat16": torch.bfloat16}.get(precision)


def known_name(name: str) -> str:
    """The name as open_clip spells it.

    Raises:
        MMHooksError: open_clip has no such model; the message names near ones.

    >>> known_name("ViT-B/32")
    'ViT-B-32'
    """
    from difflib import get_close_matches

    import open_clip

    if ":" in name:  # hf-hub:… and local-dir:…, which open_clip reads itself
        return name
    name, known = name.replace("/", "-"), open_clip.list_models()
    if name not in known:
        near = get_close_matches(name, [*known, *EMBEDDED], n=4, cutoff=0.5)
        raise MMHooksError(
            f"no model {name!r}: embedded are {', '.join(EMBEDDED)}; open_clip knows {len(known)}, "
            f"close matches: {', '.join(near) or 'none'}"
        )
    return name


def _open_clip(
    name: str,
    pretrained: str | None,
    precision: str,
    activation: Activation | None,
    cache_dir: str | Path | None,
) -> tuple[Any, Any, Any]:
    import open_clip

    from mmhooks.models.clip.activation import is_torchscript, quick_gelu_of, torchscript_weights
    from mmhooks.models.clip.declip import is_declip, load_declip

    name = known_name(name)
    if ":" in name and activation is not None:
        raise MMHooksError(
            f"activation: expected a name of open_clip's own, got {name!r}, whose configuration says it; leave it out"
        )
    if ":" not in name and pretrained and is_declip(pretrained):
        if activation not in (None, "quick_gelu"):
            raise MMHooksError(
                f"activation: expected QuickGELU, with which DeCLIP was trained ({pretrained}), got {activation!r}; leave "
                "activation= out"
            )
        return load_declip(name, pretrained, precision=precision)
    tags = open_clip.list_pretrained_tags_by_model(name) if ":" not in name else []
    if pretrained and not Path(pretrained).exists() and ":" not in name and pretrained not in tags:
        raise MissingWeights(
            f"{name} has no tag {pretrained!r} and no such file exists; tags: {', '.join(tags) or 'none'}"
        )
    options: dict[str, Any] = (
        {} if ":" in name else {"quick_gelu": quick_gelu_of(name, pretrained, activation)}
    )
    archive = pretrained if pretrained and Path(pretrained).is_file() and is_torchscript(pretrained) else None
    try:
        with no_foreign_code(name), catch_warnings():
            filterwarnings("ignore", "QuickGELU mismatch")  # of the configuration that the option replaces
            model, _, preprocess = open_clip.create_model_and_transforms(
                name,
                pretrained=None if archive else pretrained,
                precision=precision,
                cache_dir=str(cache_dir) if cache_dir else None,
                **options,
            )
            if archive:  # open_clip reads weights alone, not an archive that holds code
                model.load_state_dict(torchscript_weights(archive))
            tokenizer = open_clip.get_tokenizer(name)
    except (OSError, RuntimeError) as error:
        if pretrained is None and ":" not in name:
            raise
        raise MissingWeights(
            f"weights {pretrained or name!r} of {name} could not be loaded ({type(error).__name__}: {error}); "
            "without network give pretrained= the path of a downloaded checkpoint, or use mm.load('mini')"
        ) from error
    return model, tokenizer, preprocess
