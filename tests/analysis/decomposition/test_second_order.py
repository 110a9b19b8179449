"""Second-order effects against a live model: one neuron's write carried through the values of each later block."""

from __future__ import annotations

import pytest
import torch
from open_clip.transformer import AttentionalPooler

import mmhooks as mm
from mmhooks.analysis.decomposition.neuron_effects import second_order_effects
from mmhooks.analysis.decomposition.second_order import second_order
from mmhooks.errors import DataError, NoExactSum, ShapeMismatch
from mmhooks.models.clip.readout import image_readout
from mmhooks.models.embedded.mini import build


def witness(model, pixels, layer, neuron):
    """Effect [b e] by the hook engine: the neuron's write is normed (σ of the run), its values are added to the real
    ones at ``attn.v``, and the change of ``attn_out`` at the class token goes through the final LayerNorm with its σ."""
    visual = model.model.visual
    blocks = visual.transformer.resblocks
    depth = len(blocks)
    sites = [f"image.blocks.{layer}.mlp.post", *(f"image.blocks.{n}.resid_pre" for n in range(depth))]
    outs = [f"image.blocks.{n}.attn_out" for n in range(depth)]
    _, plain = model.run_with_cache(pixels, sites=[*sites, *outs, f"image.blocks.{depth - 1}.resid_post"])
    write = plain[sites[0]][..., neuron, None] * blocks[layer].mlp.c_proj.weight[:, neuron]
    final = plain[f"image.blocks.{depth - 1}.resid_post"][:, 0]
    total = 0
    for n in range(layer + 1, depth):
        ln, attn, x = blocks[n].ln_1, blocks[n].attn, plain[f"image.blocks.{n}.resid_pre"]
        sigma = (x.var(-1, correction=0, keepdim=True) + ln.eps).sqrt()
        normed = (write - write.mean(-1, keepdim=True)) / sigma * ln.weight
        values = (normed @ attn.in_proj_weight.chunk(3)[2].T).unflatten(-1, (attn.num_heads, -1))
        with model.hooks(fwd_hooks=[(f"image.blocks.{n}.attn.v", lambda v, hook, add=values: v + add)]):
            _, moved = model.run_with_cache(pixels, sites=[outs[n]])
        change = (moved[outs[n]] - plain[outs[n]])[:, 0]
        sigma = (final.var(-1, correction=0, keepdim=True) + visual.ln_post.eps).sqrt()
        total = total + (change - change.mean(-1, keepdim=True)) / sigma * visual.ln_post.weight @ visual.proj
    return total


@pytest.fixture(scope="module")
def model():
    return mm.load("mini")


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("layer", [1, 4])
def test_effects_equal_the_live_model(model, pixels, layer):
    neurons = [0, 17, 500]
    found = second_order_effects(model, pixels, layer=layer, neurons=neurons).vectors()
    for i, neuron in enumerate(neurons):
        expected = witness(model, pixels, layer, neuron)
        assert torch.allclose(found[:, i], expected, atol=1e-3 * float(expected.abs().max()), rtol=0), neuron


@torch.no_grad()
def test_principal_direction_sizes_and_top_images(model, pixels):
    neurons = [3, 200]
    vectors = second_order_effects(model, pixels, layer=3, neurons=neurons).vectors().double()
    found = second_order(model, pixels, layer=3, neurons=neurons, top=4, batch_size=2)
    for i in range(2):
        _, values, vh = torch.linalg.svd(vectors[:, i], full_matrices=False)
        assert abs(float(vh[0] @ found.direction[i].double())) == pytest.approx(1, abs=1e-4)
        centred = vectors[:, i] - vectors[:, i].mean(0)
        weighted = (centred.square().sum(1, keepdim=True) * centred).sum(0)
        assert float(found.direction[i].double() @ weighted) > 0
        assert float(found.explained[i]) == pytest.approx(
            float(values[0] ** 2 / values.square().sum()), abs=1e-4
        )
        distances = centred.norm(dim=1)
        assert found.top[i].tolist() == distances.argsort(descending=True)[:4].tolist()
        assert torch.allclose(
            found.top_sizes[i].double(), distances.sort(descending=True).values[:4], rtol=1e-4
        )
        norms = vectors[:, i].norm(dim=1)
        assert float(found.size[i]) == pytest.approx(float(norms.square().mean().sqrt()), rel=1e-4)
    embedding = model.encode_image(pixels)
    assert found.reference == pytest.approx(float(embedding.square().sum(1).mean().sqrt()), rel=1e-4)
    assert found.n_samples == 6 and len(found.table(1)) == 1


@torch.no_grad()
def test_directions_point_to_the_largest_centred_effects(model):
    """As the public code of the paper turns them: the majority of the largest effects, less their mean, lies on the
    positive side; whatever the batches are."""
    pairs, neurons = mm.data.pairs("mini", limit=600), list(range(0, 768, 6))
    images = torch.stack([model.preprocess(pairs.image(i)) for i in range(300)])
    effects = [second_order_effects(model, p, layer=3, neurons=neurons).vectors() for p in images.split(50)]
    vectors = torch.cat(effects).double()
    found = second_order(model, list(images.split(64)), layer=3, neurons=neurons)
    centred = vectors - vectors.mean(0)
    largest = centred.norm(dim=2).topk(30, dim=0).indices
    along = torch.einsum("bne,ne->bn", centred, found.direction.double()).gather(0, largest)
    with_them = (along > 0).double().mean(0) > 0.5
    assert float(with_them.double().mean()) >= 0.98
    assert torch.equal(
        found.direction, second_order(model, images, layer=3, neurons=neurons, batch_size=64).direction
    )


@torch.no_grad()
def test_top_images_show_what_the_direction_says(model):
    """Against a loop over images: those farthest from the mean, most of them on the direction's side. By the plain
    norms of effects it would be other images, on the other side for many neurons."""
    pairs, neurons = mm.data.pairs("mini", limit=60), list(range(0, 768, 48))
    images = torch.stack([model.preprocess(pairs.image(i)) for i in range(60)])
    found = second_order(model, images, layer=3, neurons=neurons, top=5, batch_size=16)
    effects = [
        second_order_effects(model, image[None], layer=3, neurons=neurons).vectors()[0] for image in images
    ]
    others = 0
    for i in range(len(neurons)):
        mean = sum(effect[i].double() for effect in effects) / len(effects)
        distance = [float((effect[i].double() - mean).norm()) for effect in effects]
        ranked = sorted(range(len(effects)), key=lambda j: -distance[j])[:5]
        assert found.top[i].tolist() == ranked
        sizes = [float(effect[i].norm()) for effect in effects]
        others += sorted(range(len(effects)), key=lambda j: -sizes[j])[:5] != ranked
    assert others > len(neurons) / 2
    along = torch.stack([(effects[j][i] - sum(e[i] for e in effects) / 60) @ found.direction[i]
                         for i in range(len(neurons)) for j in found.top[i].tolist()])  # fmt: skip
    assert float((along > 0).double().mean()) > 0.8


def test_images_that_can_be_read_only_once_are_refused(model, pixels):
    with pytest.raises(DataError, match=r"read twice.*list\(batches\)"):
        second_order(model, iter(pixels.split(2)), layer=3, neurons=[0])

    class Shrinks(list):
        """One batch fewer each time it is read."""

        def __iter__(self):
            batches = [self[i] for i in range(len(self))]
            self.pop()
            return iter(batches)

    with pytest.raises(DataError, match="the same images twice, got 6 and then 4"):
        second_order(model, Shrinks(pixels.split(2)), layer=3, neurons=[0])
    with pytest.raises(DataError, match="no images"):
        second_order(model, [], layer=3, neurons=[0])


@torch.no_grad()
@pytest.mark.parametrize("n", [1, 2])
def test_the_mean_decides_where_no_effect_stands_out(model, pixels, n):
    neurons = [0, 17, 500]
    mean = second_order_effects(model, pixels[:n], layer=3, neurons=neurons).vectors().mean(0)
    found = second_order(model, pixels[:n], layer=3, neurons=neurons, top=1)
    assert bool(((found.direction * mean).sum(1) > 0).all())


@torch.no_grad()
def test_all_neurons_of_an_average_pooling():
    """With two tokens read, reach goes over all queries: against vectors token by token."""
    import open_clip

    vision = {
        "image_size": 32,
        "patch_size": 16,
        "width": 32,
        "layers": 3,
        "head_width": 16,
        "pool_type": "avg",
    }
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    torch.manual_seed(0)
    model = mm.HookedCLIP(open_clip.CLIP(24, vision, text).eval())
    pixels = torch.randn(3, 3, 32, 32)
    found = second_order_effects(model, pixels, layer=0).vectors()
    readout = image_readout(model.model)
    blocks = model.model.visual.transformer.resblocks
    _, c = model.run_with_cache(pixels, sites=["image.blocks.*"])
    frozen = readout.freeze(c["image.blocks.2.resid_post"])
    for neuron in (0, 77):
        write = c["image.blocks.0.mlp.post"][..., neuron, None] * blocks[0].mlp.c_proj.weight[:, neuron]
        expected = 0
        for n in (1, 2):
            x, ln, attn = c[f"image.blocks.{n}.resid_pre"], blocks[n].ln_1, blocks[n].attn
            normed = (write - write.mean(-1, keepdim=True)) / (
                x.var(-1, correction=0, keepdim=True) + ln.eps
            ).sqrt()
            values = (normed * ln.weight @ attn.in_proj_weight.chunk(3)[2].T).unflatten(-1, (2, -1))
            mixed = torch.einsum("bhqt,bthk->bqhk", c[f"image.blocks.{n}.attn.pattern"], values).flatten(2)
            out = mixed @ attn.out_proj.weight.T
            expected = expected + frozen.linear(out - out.mean(-1, keepdim=True))
        assert torch.allclose(found[:, neuron], expected, atol=1e-5)


def test_errors_say_what_exists(model, pixels):
    with pytest.raises(ShapeMismatch, match=r"0\.\.4.*layer 5 of 6"):
        second_order(model, pixels, layer=5)
    with pytest.raises(ShapeMismatch, match="MLP of 768 neurons"):
        second_order(model, pixels, layer=2, neurons=[900])
    model = mm.HookedCLIP(build().eval())
    visual = model.model.visual
    visual.attn_pool, visual.attn_pool_contrastive = AttentionalPooler(192, 192, n_head=6, n_queries=1), None
    with pytest.raises(NoExactSum, match="pools by attention"):
        second_order(model, pixels, layer=2)


def test_a_neuron_in_texts(model, pixels):
    """Its direction is a vector of the joint space: texts code it like any embedding."""
    found = second_order(model, pixels, layer=3, neurons=[0])
    pool = mm.data.text_pool("general")
    from mmhooks.models.clip.embed_texts import embed_texts

    code = mm.sparse_text_code(
        found.direction, embed_texts(model, pool.texts), pool.texts, mean=torch.zeros(256), penalty=0.1
    )
    assert 0 < float(code.l0[0]) < 60 and float(code.cosine[0]) > 0.1
