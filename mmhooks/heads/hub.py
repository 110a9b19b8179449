"""Heads on the Hugging Face Hub: downloaded in any supported format, published in ours or SAELens's."""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mmhooks.errors import MissingWeights, MMHooksError
from mmhooks.heads.base import Head
from mmhooks.heads.card import card_facts, head_card
from mmhooks.heads.formats import Options, read_head, save_saelens
from mmhooks.utils.assets import ASSETS, EMBEDDED, EMBEDDED_VLMS
from mmhooks.utils.files import write_text

if TYPE_CHECKING:
    import torch

WANTED = ("*.json", "*.safetensors", "*.pt", "*.pth")


def fetch(repo: str, *, inside: str | None = None, revision: str | None = None, cache_dir: str | Path | None = None,
          token: str | bool | None = None) -> Path:  # fmt: skip
    """The local path of a repository's heads, downloaded unless cached.

    Args:
        inside: a folder or a file of the repository; only it (and the JSON files beside it) is downloaded.

    Raises:
        MissingWeights: no such repository, no network and nothing cached, or nothing at ``inside``.
    """
    from huggingface_hub import snapshot_download

    patterns: list[str] = list(WANTED)
    if inside is not None:
        folder = (
            Path(inside).parent.as_posix()
            if Path(inside).suffix in (".pt", ".pth", ".safetensors")
            else inside
        )
        prefix = "" if folder == "." else folder.rstrip("/") + "/"
        patterns = [inside, prefix + "*.json"] if folder != inside else [prefix + wanted for wanted in WANTED]
    try:
        root = snapshot_download(
            repo, revision=revision, cache_dir=cache_dir, token=token, allow_patterns=patterns
        )
    except Exception as error:
        raise MissingWeights(
            f"{repo!r}" + (f" at {revision!r}" if revision else "")
            + f" could not be downloaded from the Hub ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no reason given'}). "
            "Without network only cached repositories can be loaded; otherwise give the path of a local copy"
        ) from error  # fmt: skip
    path = Path(root) / inside if inside else Path(root)
    if not path.exists():
        raise MissingWeights(f"{repo!r} contains no {inside!r}")
    return path


def read_pretrained(
    source: str | Path,
    *,
    inside: str | None,
    revision: str | None,
    cache_dir: str | Path | None,
    token: str | bool | None,
    options: dict[str, Any],
) -> Head:
    """Implements :meth:`Head.from_pretrained` for any class: reads a local path if it exists, else downloads."""
    path = Path(source)
    if path.exists():
        path = path / inside if inside else path
    else:
        path = fetch(str(source), inside=inside, revision=revision, cache_dir=cache_dir, token=token)
    return read_head(path, Options(**options))


def push(head: Head, repo: str, *, private: bool = False, format: Literal["mmhooks", "saelens"] = "mmhooks",
         dtype: Literal["fp32", "fp16"] = "fp16", inside: str | None = None, message: str | None = None,
         token: str | bool | None = None, licence: str | None = None, base_model: str | None = None,
         data: str | None = None) -> str:  # fmt: skip
    """Publishes ``head`` as the repository ``owner/name`` and returns the URL of the commit.

    Warns if its card does not state a licence, the base model or the data.

    Args:
        format: ours, or SAELens's (always fp32).
        inside: folder of the repository to write to, for several heads in one.
        licence, base_model, data: of the card (:func:`mmhooks.heads.card.card_facts`); by default what ``head.info`` says.

    Raises:
        MMHooksError: a name other than ``owner/name``, no token, no network; the message includes the Hub's own.
    """
    from huggingface_hub import HfApi

    if repo.count("/") != 1 or not all(repo.split("/")):
        raise MMHooksError(f"expected a repository as owner/name, got {repo!r}")
    facts = card_facts(head, licence=licence, base_model=base_model, data=data)
    if facts.missing:
        warnings.warn(
            f"expected {', '.join(facts.missing)} of {repo!r}, got none: its card says not stated; pass "
            f"{', '.join(f'{name}=' for name in facts.missing)} or set them in head.info",
            stacklevel=3,
        )
    with tempfile.TemporaryDirectory() as folder:
        if format == "saelens":
            save_saelens(head, folder)
        else:
            head.save(folder, dtype=dtype)
        write_text(Path(folder) / "README.md", head_card(head, repo, format, inside, facts))
        try:
            api = HfApi(token=token)
            api.create_repo(repo, private=private, exist_ok=True)
            done: Any = api.upload_folder(
                repo_id=repo, folder_path=folder, path_in_repo=inside, commit_message=message or f"{head.kind} head {head.id}"
            )  # fmt: skip
        except Exception as error:
            raise MMHooksError(
                f"{repo!r} could not be uploaded to the Hub ({type(error).__name__}: {error}); it needs network and a "
                "token with write access (huggingface-cli login, or token=). head.save(path) saves it locally"
            ) from error
    return str(getattr(done, "commit_url", done))


def load_head(
    source: str | Path,
    *,
    subfolder: str | None = None,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    **options: Any,
) -> Head:
    """A sparse head from the package (``"mini/sae"``), a folder or file, or a Hugging Face Hub repository.

    The format is recognised by its files: our own, SAELens, sparsify, dictionary_learning, ViT-Prisma, saev, PatchSAE,
    MSAE and overcomplete (:data:`mmhooks.heads.formats.FORMATS`). Heads of vision models name the site they belong to.

    Args:
        source: name, path, or ``owner/name`` on the Hub.
        subfolder: folder or file inside it, if it contains several heads.
        revision, cache_dir: of the Hub's copy.
        options: ``token`` of the Hub, and what a file of another library does not specify: ``name``,
            ``normalize_input`` (give raw vectors unit norm first), ``kind``, ``k``, ``threshold``.

    Raises:
        MissingWeights: no head there; the message lists the files found and the supported formats.
        MMHooksError: a known format whose contents do not fit; an unknown or inapplicable option.

    >>> sae = load_head("mini/sae"); (sae.d_in, sae.n_features)
    (256, 256)
    """
    from mmhooks.heads.base import Head
    from mmhooks.heads.formats import Options

    known = [*(f.name for f in fields(Options)), "token"]
    unknown = sorted(options.keys() - set(known))
    if unknown:
        raise MMHooksError(f"load_head: unknown option {', '.join(unknown)}; known are {', '.join(known)}")
    embedded = str(source) in embedded_heads()
    path = ASSETS / source if embedded else Path(source)
    if revision is not None and path.exists():
        raise MMHooksError(
            f"{source} is a local path, which has no revisions: expected no revision=, got {revision!r}; "
            "leave it out, or name a repository of the Hub"
        )
    if not path.exists() and (
        str(source).split("/")[0] in (*EMBEDDED, *EMBEDDED_VLMS) or str(source).count("/") != 1
    ):
        raise MissingWeights(
            f"no head at {str(source)!r}: embedded heads are {', '.join(embedded_heads())}; otherwise give the path of a "
            "directory or file of weights, or a Hub id owner/name"
        )
    return Head.from_pretrained(
        path if embedded else source,
        subfolder=subfolder,
        device=device,
        revision=revision,
        cache_dir=cache_dir,
        **options,
    )


def embedded_heads() -> list[str]:
    """Names of the heads that ship with the package."""
    return sorted(f"{path.parent.parent.name}/{path.parent.name}" for path in ASSETS.glob("*/*/config.json"))
