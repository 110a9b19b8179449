"""Wrong but plausible inputs to everything that runs a CLIP: the right result, or one of our errors with a remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

import mmhooks as mm
from mmhooks.analysis.attribution.saliency import METHODS
from mmhooks.analysis.decomposition.dataset import decompositions, head_outputs
from mmhooks.analysis.decomposition.neuron_effects import second_order_effects
from mmhooks.analysis.decomposition.second_order import second_order
from mmhooks.analysis.interventions.ablation_accuracy import ablate
from mmhooks.analysis.interventions.mean_ablation import Parts, head_importance, site_means
from mmhooks.errors import MMHooksError
from mmhooks.models.clip.embed_texts import embed_texts

SITE = "image.blocks.1.mlp_out"


def pixels(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape or (2, 3, 64, 64), generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.fixture(scope="module")
def mini() -> mm.HookedCLIP:
    return mm.load("mini")


def _ablations(model: Any, given: Any) -> Any:
    mini = mm.load("mini")
    means = mm.decompose(mini, [pixels()])
    return ablate(model, given, torch.tensor([0, 1]), pixels(3, 256), means, [Parts("one", mlps=(1,))])


# Every public function of the analysis that runs an image tower over what it is given.
RUNS: dict[str, Callable[[Any, Any], Any]] = {
    "decompose": lambda model, given: mm.decompose(model, given),
    "decompositions": lambda model, given: list(decompositions(model, given)),
    "head_outputs": lambda model, given: head_outputs(model, given),
    "site_means": lambda model, given: site_means(model, given, [SITE]),
    "second_order": lambda model, given: second_order(model, given, layer=2, neurons=[0]),
    "second_order_effects": lambda model, given: second_order_effects(model, given, layer=2, neurons=[0]),
    "ablations": _ablations,
    **{
        name: (lambda model, given, method=method: method(model, given, pixels(2, 256)))
        for name, method in METHODS.items()
    },
}

IMAGES: dict[str, Any] = {
    "one image without its batch axis": lambda: pixels(3, 64, 64),
    "a PIL image": lambda: Image.new("RGB", (64, 64)),
    "a list of PIL images": lambda: [Image.new("RGB", (64, 64))] * 2,
    "images of another size": lambda: pixels(2, 3, 32, 32),
    "grey images": lambda: pixels(2, 1, 64, 64),
    "channels last": lambda: pixels(2, 64, 64, 3),
    "bytes": lambda: torch.zeros(2, 3, 64, 64, dtype=torch.uint8),
    "a NumPy array": lambda: np.zeros((2, 3, 64, 64), np.float32),
    "tokens": lambda: torch.ones(2, 16, dtype=torch.long),
    "texts": lambda: ["a dog", "a cat"],
    "no image": lambda: pixels(2, 3, 64, 64)[:0],
}


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("name", RUNS)
def test_invalid_images_are_refused(mini, name, kind):
    with pytest.raises(MMHooksError) as fault:
        RUNS[name](mini, IMAGES[kind]())
    assert "expected" in str(fault.value) or "no " in str(fault.value) or "images need" in str(fault.value)
    assert len(mini._registry) == 0


@pytest.mark.parametrize("name", RUNS)
def test_a_model_that_is_not_hooked(mini, name):
    with pytest.raises(
        MMHooksError, match=r"expected a mm.HookedCLIP, got a CLIP: create one with mm.HookedCLIP\(model"
    ):
        RUNS[name](mini.model, pixels())
    with pytest.raises(MMHooksError, match="expected a mm.HookedCLIP, got a str"):
        RUNS[name]("mini", pixels())


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("change", ["double", "half", "requires_grad", "inference", "strided"])
def test_unusual_but_valid_input_works_and_is_not_changed(mini, name, change):
    given = {
        "double": lambda: pixels(dtype=torch.float64),
        "half": lambda: pixels(dtype=torch.float16),
        "requires_grad": lambda: pixels().requires_grad_(),
        "inference": lambda: _inference(),
        "strided": lambda: pixels().contiguous(memory_format=torch.channels_last),
    }[change]()
    before, requires = given.detach().clone(), given.requires_grad
    RUNS[name](mini, given)
    assert given.requires_grad == requires and given.grad is None
    assert torch.equal(given.detach(), before)


def _inference() -> torch.Tensor:
    with torch.inference_mode():
        return pixels()


@pytest.mark.parametrize("name", RUNS)
def test_no_caller_s_tensor_gets_a_gradient(mini, name):
    given = pixels()
    RUNS[name](mini, given)
    assert not given.requires_grad and given.is_leaf


DIRECTIONS = {
    "texts": ["a dog", "a cat"],
    "one vector": torch.randn(256),
    "another model's": torch.randn(2, 512),
    "integers": torch.ones(2, 256, dtype=torch.long),
    "a NumPy array": np.zeros((2, 256), np.float32),
}


@pytest.mark.parametrize("kind", DIRECTIONS)
@pytest.mark.parametrize("name", ["against", *METHODS])
def test_invalid_directions_are_refused(mini, name, kind):
    directions = DIRECTIONS[kind]
    with pytest.raises(MMHooksError, match=r"(against=|directions): expected vectors \[m "):
        if name == "against":
            mm.decompose(mini, pixels(), against=directions)
        else:
            METHODS[name](mini, pixels(), directions)


def test_invalid_texts_are_refused(mini):
    for given in (["a dog"], "a dog", pixels(), torch.ones(3, 4), torch.ones(5, dtype=torch.long)):
        with pytest.raises(MMHooksError, match=r"expected tokens \[n l\]"):
            mm.decompose(mini, texts=given)
    for given in ("a dog", [1, 2], []):
        with pytest.raises(MMHooksError, match=r"expected a list of texts|expected at least one text"):
            embed_texts(mini, given)


def test_towers_and_directions_of_other_kinds(mini):
    with pytest.raises(MMHooksError, match='tower: expected "image" or "text", got "audio"|got \'audio\''):
        list(decompositions(mini, pixels(), tower="audio"))
    with pytest.raises(MMHooksError, match="direction: expected vectors"):
        head_importance(mm.decompose(mini, pixels()), torch.randn(7))
    with pytest.raises(MMHooksError, match="sites: expected a list of names"):
        site_means(mini, pixels(), SITE)


def test_any_size_where_the_model_reads_any():
    """A convolutional tower has no size: means of its sites are made of images of any."""
    torch.manual_seed(0)
    vision = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}

    model = mm.HookedCLIP(open_clip.CLIP(12, vision, text).eval())  # type: ignore[arg-type]
    assert model.image_size is None and mm.load("mini").image_size == (64, 64)


def test_token_contributions_do_not_grow_with_the_square_of_the_batch(mini):
    """The largest tensor of scores holds some directions a token, not one for every image of the batch."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(value, torch.Tensor):
                    self.numbers = max(self.numbers, value.numel())
            return out

    sizes = []
    for n in (16, 64):
        with Largest() as seen:
            METHODS["token contributions"](mini, pixels(n, 3, 64, 64), pixels(n, 256))
        sizes.append(seen.numbers)
    assert sizes[1] <= 1.1 * max(sizes[0], 64 * 3 * 64 * 64)
    together = METHODS["token contributions"](mini, pixels(20, 3, 64, 64), pixels(20, 256))
    alone = [
        METHODS["token contributions"](mini, pixels(20, 3, 64, 64)[i : i + 1], pixels(20, 256)[i : i + 1])
        for i in range(0, 20, 7)
    ]
    torch.testing.assert_close(together[::7], torch.cat(alone), rtol=1e-4, atol=1e-5)
