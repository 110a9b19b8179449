"""Hooks against raw torch, TransformerLens and nnsight; splices against hand-written ones.

    python -m pytest benchmarks/test_hooks.py --benchmark-only

takes about five minutes and ends with a table for RESULTS.md (see ``race.py``). Every case first asserts that all
contenders compute the same. Run it on an idle machine.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import contextmanager

import pytest
import torch
from race import SECONDS, TABLE, race
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mmhooks as mm
from mmhooks.hooks.sites import SiteMap
from mmhooks.models.hooked import HookedModel

THREADS = pytest.mark.parametrize("threads", [1, 2])
pytestmark = pytest.mark.usefixtures("no_grad")


def clip(name: str) -> mm.HookedCLIP:
    import open_clip

    from mmhooks.models.embedded.mini import build

    torch.manual_seed(0)
    model = build() if name == "mini" else open_clip.create_model("ViT-B-32", pretrained=None)
    return mm.HookedCLIP(model.eval())


def pixels(name: str, batch: int) -> torch.Tensor:
    size = 64 if name == "mini" else 224
    return torch.randn(batch, 3, size, size)


@THREADS
@pytest.mark.parametrize("name", ["mini", "ViT-B-32"])
def test_a_idle_forward(benchmark, name, threads):
    """(a) before, through mmhooks, and after a context."""
    model, used = clip(name), clip(name)
    images = pixels(name, 4 if name == "mini" else 1)
    used.run_with_cache(images, sites=["image.*"])
    raw = model.model.encode_image
    assert torch.equal(raw(images), model.encode_image(images))
    assert torch.equal(raw(images), used.encode_image(images))
    race(benchmark, f"(a) idle, {name}", {
        "raw open_clip": lambda: raw(images),
        "mmhooks idle": lambda: model.encode_image(images),
        "mmhooks after a context": lambda: used.encode_image(images),
    })  # fmt: skip


class Chain(nn.Module):
    """Identities: nothing but the cost of the hooks."""

    def __init__(self, n: int, point: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.points = nn.ModuleList(point() for _ in range(n))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for point in self.points:
            x = point(x)
        return x


@contextmanager
def raw_hooks(net: Chain, store: dict[str, torch.Tensor]):
    def hook(name: str):
        def keep(module, args, output):
            store[name] = output.detach()

        return keep

    handles = [point.register_forward_hook(hook(f"points.{n}")) for n, point in enumerate(net.points)]
    yield
    [handle.remove() for handle in handles]


@pytest.mark.parametrize("n", [1, 12, 48])
def test_b_capture_hooks(benchmark, n):
    """(b) cost of n active capture hooks."""
    from transformer_lens import HookedRootModule
    from transformer_lens.hook_points import HookPoint

    class Lens(HookedRootModule):
        def __init__(self) -> None:
            super().__init__()
            self.points = nn.ModuleList(HookPoint() for _ in range(n))
            self.setup()

        forward = Chain.forward

    x, ours, theirs, store = torch.randn(2, 8), Chain(n, nn.Identity), Chain(n, HookPoint), {}
    bare, plain = Chain(n, nn.Identity), Chain(n, nn.Identity)
    hooked = HookedModel(ours, SiteMap(ours))
    for k, point in enumerate(theirs.points):  # the least that a HookPoint can do
        point.name = f"points.{k}"
        point.add_hook(lambda t, hook: lens.__setitem__(hook.name, t.detach()))
    caching = Lens()  # what its run_with_cache installs
    kept = caching.add_caching_hooks()
    lens: dict[str, torch.Tensor] = {}
    with raw_hooks(plain, store), hooked.caching("points.*") as cache:
        ours(x), plain(x), theirs(x), caching(x)
        assert list(cache) == list(store) == list(lens) == list(kept) and all(
            torch.equal(cache[k], store[k]) for k in store
        )
        best = race(benchmark, f"(b) {n} hooks on identities", {
            "raw hooks": lambda: plain(x),
            "no hooks": lambda: bare(x),
            "mmhooks": lambda: ours(x),
            "HookPoint, bare function": lambda: theirs(x),
            "TransformerLens cache": lambda: caching(x),
        }, loops=200).best  # fmt: skip
    floor = best["no hooks"]
    each = {name: (best[name] - floor) / n * 1e6 for name in best if name != "no hooks"}
    for name, cost in each.items():
        TABLE.append(
            f"| (b) each of {n} hooks | {name} | {cost:.2f} µs | {cost / each['raw hooks']:.2f} | | |"
        )
    benchmark.extra_info["us a hook"] = each


def test_b_three_captures_with_nnsight(benchmark):
    """(b) three layers of mini captured, entry and exit of the context included."""
    from nnsight import NNsight

    model = clip("mini")
    images = torch.randn(1, 3, 64, 64)
    blocks = model.model.visual.transformer.resblocks
    sites = [f"image.blocks.{n}.resid_post" for n in (1, 3, 5)]
    lens, sight = model.as_transformer_lens(), NNsight(model.model.visual)

    def raw():
        store = {}
        handles = [
            blocks[n].register_forward_hook(lambda m, i, o, n=n: store.__setitem__(n, o.detach()))
            for n in (1, 3, 5)
        ]
        model.model.encode_image(images)
        [handle.remove() for handle in handles]
        return store

    def nnsight():
        with sight.trace(images):
            a = sight.transformer.resblocks[1].output.save()
            b = sight.transformer.resblocks[3].output.save()
            c = sight.transformer.resblocks[5].output.save()
        return a, b, c

    want, got = raw(), model.run_with_cache(images, sites=sites)[1]
    for n, site, third in zip((1, 3, 5), sites, nnsight(), strict=True):
        assert torch.equal(want[n], got[site]) and torch.equal(want[n], third)
    race(benchmark, "(b) 3 captures, mini", {
        "raw hooks": raw,
        "no hooks": lambda: model.model.encode_image(images),
        "mmhooks": lambda: model.run_with_cache(images, sites=sites),
        "TransformerLens view": lambda: lens.run_with_cache(images, names_filter=sites),
        "nnsight": nnsight,
    })  # fmt: skip


class Peak(TorchDispatchMode):
    """Bytes of tensors alive at once, counted by their storages as operations make them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {
            t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)
        }
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                key = storage._cdata
                if key not in self._seen and key not in given:
                    self._seen.add(key)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._gone, key, storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def peak(run: Callable[[], object]) -> str:
    """Peak MiB of one call, its result held as a user holds it."""
    with Peak() as memory:
        kept = run()
    del kept
    return f"peak {memory.most / 2**20:.1f} MiB"


def check_peak() -> None:
    """The counter against sizes known by hand."""
    with Peak() as memory:
        a = torch.zeros(1024, 1024)
        b = a + 1
        c = b[0].view(2, 512)
        del a, b, c
        assert memory.now == 0
        torch.zeros(1024, 1024) + 1
    assert memory.most == 2 * 4 * 2**20


@THREADS
@pytest.mark.parametrize("name", ["mini", "ViT-B-32"])
def test_c_cache(benchmark, name, threads):
    """(c) one site, the residual stream, everything: images a second and peak memory of activations and cache."""
    check_peak()
    model = clip(name)
    batch = 16 if name == "mini" else 4
    images, lens = pixels(name, batch), model.as_transformer_lens()
    blocks = model.model.visual.transformer.resblocks

    def raw() -> dict[int, torch.Tensor]:
        store: dict[int, torch.Tensor] = {}
        handles = [
            b.register_forward_hook(lambda m, i, o, n=n: store.__setitem__(n, o.detach()))
            for n, b in enumerate(blocks)
        ]
        model.model.encode_image(images)
        [handle.remove() for handle in handles]
        return store

    stream = model.run_with_cache(images, sites=["image.blocks.*.resid_post"])[1]
    assert all(torch.equal(stream[f"image.blocks.{n}.resid_post"], value) for n, value in raw().items())
    ours, theirs = model.run_with_cache(images)[1], lens.run_with_cache(images)[1]
    assert set(ours) == {k for k in theirs.keys() if k.startswith("image")}  # noqa: SIM118
    for site in ours:
        torch.testing.assert_close(ours[site], theirs[site], atol=1e-5, rtol=1e-4)
    del ours, theirs, stream
    contenders = {
        "no cache": lambda: model.encode_image(images),
        "image.embed": lambda: model.run_with_cache(images, sites=["image.embed"]),
        "resid_post, raw hooks": raw,
        "resid_post": lambda: model.run_with_cache(images, sites=["image.blocks.*.resid_post"]),
        "resid_post in fp16": lambda: model.run_with_cache(
            images, sites=["image.blocks.*.resid_post"], dtype=torch.float16
        ),
        "attn.z": lambda: model.run_with_cache(images, sites=["image.blocks.*.attn.z"]),
        "all of image.*": lambda: model.run_with_cache(images, sites=["image.*"]),
        "all, TransformerLens view": lambda: lens.run_with_cache(images),
    }
    notes = {label: peak(run) for label, run in contenders.items()}
    race(benchmark, f"(c) cache, {name}", contenders, amount=batch, notes=notes, seconds=1.5 * SECONDS)


@THREADS
@pytest.mark.parametrize("n", [1024, 16384])
def test_e_mask_through_a_topk_sae(benchmark, n, threads):
    """(e) batch 1,024, d = 512, K = 32, a third of the features masked."""
    d, k = 512, 32
    sae, x = mm.TopKSAE(d, n, k), torch.randn(1024, d)
    mask = torch.zeros(n, dtype=torch.bool)
    mask[: n // 3] = True
    nets = {name: nn.Sequential(nn.Identity()) for name in ("hand", "double", "full")}
    ours = nn.Sequential(nn.Identity())
    hooked = HookedModel(ours, SiteMap(ours))
    hooked.attach(sae, at="0")

    def by_hand(module, args, out):
        scale = out.norm(dim=-1, keepdim=True)
        values, index = F.linear(out / scale - sae.b_pre, sae.W_enc, sae.b_enc).topk(k, dim=-1, sorted=False)
        values = values.relu() * mask[index]
        return out - scale * F.embedding_bag(index, sae.W_dec, per_sample_weights=values, mode="sum")

    def double_encode(module, args, out):  # SAELens: the error term is a second pass through the head
        scale = out.norm(dim=-1, keepdim=True)
        f = sae.encode(out / scale)
        f[:, mask] = 0
        return scale * (sae.decode(f) + (out / scale - sae.decode(sae.encode(out / scale))))

    def no_error_term(module, args, out):
        scale = out.norm(dim=-1, keepdim=True)
        f = sae.encode(out / scale)
        f[:, mask] = 0
        return scale * sae.decode(f)

    for name, hook in (("hand", by_hand), ("double", double_encode), ("full", no_error_term)):
        nets[name][0].register_forward_hook(hook)
    with hooked.hooks(mask=mask):
        for name in ("hand", "double"):
            torch.testing.assert_close(ours(x), nets[name](x), atol=1e-5, rtol=1e-5)
        race(benchmark, f"(e) mask through TopK, n = {n}", {
            "best by hand": lambda: nets["hand"](x),
            "mmhooks": lambda: ours(x),
            "double encode": lambda: nets["double"](x),
            "by hand, no error term": lambda: nets["full"](x),
        }, seconds=SECONDS if n < 2000 else 3 * SECONDS)  # fmt: skip
