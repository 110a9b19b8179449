"""What mmhooks and SAELens do in one interpreter; run by ``saelens.py``, in whose environment both are installed.

The name is not one that pytest collects: where SAELens is missing, these would be skipped, and a skip tells nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path

import pytest
import sae_lens
import torch
import transformer_lens
from packaging.requirements import Requirement

import mmhooks as mm
from mmhooks.heads import SAE
from mmhooks.heads.formats import save_saelens

D, N, K = 64, 256, 8
KINDS: dict[str, Callable[[], SAE]] = {
    "topk": lambda: mm.TopKSAE(D, N, K),
    "batchtopk": lambda: mm.BatchTopKSAE(D, N, K),
    "matryoshka": lambda: mm.MatryoshkaSAE(D, N, K),
    "jumprelu": lambda: mm.JumpReLUSAE(D, N, threshold=0.05),
    "relu": lambda: mm.ReLUSAE(D, N),
}


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal within rounding, and the same entries active."""
    assert torch.equal(got > 0, want > 0)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-5)


def test_both_are_of_this_environment() -> None:
    assert sae_lens.SAE.__module__.startswith("sae_lens") and mm.load("mini").sites()
    assert transformer_lens.HookedTransformer  # SAELens needs it; TransformerLens 4 has it no longer


@pytest.mark.parametrize("name", ["sae-lens", "mmhooks"])
def test_what_each_asks_is_what_is_installed(name: str) -> None:
    asked = [Requirement(text) for text in distribution(name).requires or []]
    asked = [r for r in asked if r.marker is None or r.marker.evaluate({"extra": ""})]
    assert len(asked) > 5
    for requirement in asked:
        version = distribution(requirement.name).version
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement}, but {version}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_goes_there_and_back(kind: str, tmp_path: Path) -> None:
    """Ours, in SAELens's files, in SAELens's class, in the files that it writes, and ours again."""
    x = torch.randn(500, D, generator=torch.Generator().manual_seed(0)) * 20 + 1  # raw vectors, norm 160
    head = KINDS[kind]()
    mm.train_head(head, x, x.flip(0), epochs=3, batch_size=100, progress=False)
    save_saelens(head, tmp_path / "there", hook_name="visual.ln_post")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "there", device="cpu")
    assert (
        type(theirs).__module__.startswith("sae_lens.") and theirs.cfg.metadata.hook_name == "visual.ln_post"
    )
    theirs.save_model(tmp_path / "back")
    back = mm.load_head(tmp_path / "back")
    assert isinstance(back, SAE) and back.kind == head.kind
    with torch.no_grad():
        want, recon = head.encode(x), head(x)
        assert 0 < float((want > 0).float().sum(dim=1).mean()) < N and not torch.allclose(recon, recon[:1])
        features = theirs.encode(x)
        same(features, want)
        torch.testing.assert_close(theirs.decode(features), recon, atol=1e-4, rtol=1e-5)
        same(back.encode(x), want)
        torch.testing.assert_close(back(x), recon, atol=1e-4, rtol=1e-5)


def test_the_head_of_mini_goes_there_and_back(tmp_path: Path) -> None:
    """On the embeddings of drawings, attached at its site: features at the site are those of SAELens's class."""
    model, head = mm.load("mini"), mm.load_head("mini/sae")
    model.attach(head, at=["image.embed"])
    pixels = torch.stack([model.preprocess(pair.image) for pair in mm.data.pairs("mini", limit=32)])
    site = f"image.embed.{head.name}.latents"
    _, cache = model.run_with_cache(images=pixels, sites=["image.embed", site])
    save_saelens(head, tmp_path / "there")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "there", device="cpu")
    with torch.no_grad():
        same(theirs.encode(cache["image.embed"]), cache[site])
        theirs.save_model(tmp_path / "back")
        same(mm.load_head(tmp_path / "back").encode(cache["image.embed"]), cache[site])
