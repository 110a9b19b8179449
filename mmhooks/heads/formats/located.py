"""Where a foreign head belongs: the site that its file names, in our names, and how its images were prepared.

A head's ``info["sites"]`` names its sites, so that ``model.attach(head)`` needs no ``at=``; ``info["preprocess"]`` holds what
the file says of the model, the images and the tokens. Where a file names no site, ``info["site_missing"]`` says what to pass.
"""

from __future__ import annotations

from typing import Any, TypeVar

from mmhooks.heads.base import Head

H = TypeVar("H", bound=Head)

# Of ViT-Prisma and TransformerLens: what has the same value in the model's own code.
LEAVES = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_out",
    "hook_mlp_out": "mlp_out",
    "mlp.hook_pre": "mlp.pre",
    "mlp.hook_post": "mlp.post",
}


def image_site(layer: int, leaf: str = "resid_post") -> str:
    """A site of an image tower's block; a negative layer counts from the last when the head is attached.

    >>> image_site(9, "mlp_out"), image_site(-2)
    ('image.blocks.9.mlp_out', 'image.blocks.-2.resid_post')
    """
    return f"image.blocks.{layer}.{leaf}"


def located(head: H, site: str | None, missing: str = "", **preprocess: Any) -> H:
    """The head with its site, or what to pass instead of one, and with what is known of its preprocessing (not None).

    >>> from mmhooks.heads import TopKSAE
    >>> located(TopKSAE(8, 32, 4), "image.embed", model="clip", tokens=None).sites
    ('image.embed',)
    """
    known = {name: value for name, value in preprocess.items() if value is not None}
    where = {"sites": [site]} if site is not None else {"site_missing": missing}
    head.info = head.info | where | ({"preprocess": known} if known else {})
    return head
