"""Hooks against raw torch, TransformerLens and nnsight; splices against hand-written ones.

    python -m pytest -o addopts= benchmarks/test_hooks.py --benchmark-only -s

(``addopts=`` leaves out the run-time type checks of the test run, which would be timed too.)

Every case asserts that all contenders compute the same before it times them. Contenders take turns, round by
round, so that a slow moment of the machine hits all of them; the table shows ratios of minima and medians.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mmhooks as mm
from mmhooks.hooks.sites import SiteMap
from mmhooks.models.hooked import HookedModel

ROUNDS = int(os.environ.get("MMHOOKS_BENCH_ROUNDS", "30"))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


def race(
    benchmark, first: str, contenders: dict[str, Callable[[], object]], *, loops: int = 1
) -> dict[str, float]:
    """Takes turns; the fixture times a last round of ``first``, ratios go to ``extra_info`` and the screen."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()
    for _ in range(ROUNDS):
        for name, run in contenders.items():
            start = time.perf_counter()
            for _ in range(loops):
                run()
            times[name].append((time.perf_counter() - start) / loops)
    benchmark.pedantic(contenders[first], rounds=3)
    best = {name: min(t) for name, t in times.items()}
    for name in contenders:
        median = statistics.median(times[name]) / statistics.median(times[first])
        line = f"{best[name] * 1e6:12.1f} us  x{best[name] / best[first]:.3f} (median x{median:.3f})"
        benchmark.extra_info[name] = line.strip()
        print(f"\n  {name:28}{line}", end="")
    return best


def clip(name: str) -> mm.HookedCLIP:
    import open_clip

    from mmhooks.models.mini import build

    torch.manual_seed(0)
    model = build() if name == "mini" else open_clip.create_model("ViT-B-32", pretrained=None)
    return mm.HookedCLIP(model.eval())


@pytest.mark.parametrize("name", ["mini", "ViT-B-32"])
def test_a_idle_forward(benchmark, name):
    """(a) before, through mmhooks, and after a context."""
    model = clip(name)
    used = clip(name)
    size = 64 if name == "mini" else 224
    images = torch.randn(4, 3, size, size)
    used.run_with_cache(images, sites=["image.*"])
    raw = model.model.encode_image
    assert torch.equal(raw(images), model.encode_image(images))
    assert torch.equal(raw(images), used.encode_image(images))
    race(benchmark, "raw open_clip", {
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
        best = race(benchmark, "raw hooks", {
            "raw hooks": lambda: plain(x),
            "no hooks": lambda: bare(x),
            "mmhooks": lambda: ours(x),
            "HookPoint, bare function": lambda: theirs(x),
            "TransformerLens cache": lambda: caching(x),
        }, loops=200)  # fmt: skip
    floor = best["no hooks"]
    each = {name: (best[name] - floor) / n * 1e6 for name in best if name != "no hooks"}
    print("\n  us a hook:", ", ".join(f"{k} {v:.2f}" for k, v in each.items()))
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
    race(benchmark, "raw hooks", {
        "raw hooks": raw,
        "no hooks": lambda: model.model.encode_image(images),
        "mmhooks": lambda: model.run_with_cache(images, sites=sites),
        "TransformerLens view": lambda: lens.run_with_cache(images, names_filter=sites),
        "nnsight": nnsight,
    })  # fmt: skip


@pytest.mark.parametrize("name", ["mini", "ViT-B-32"])
def test_c_cache(benchmark, name):
    """(c) one site, and all of the residual stream."""
    model = clip(name)
    size = 64 if name == "mini" else 224
    images = torch.randn(8, 3, size, size)
    assert torch.equal(model.run_with_cache(images)[0].image, model.encode_image(images))
    race(benchmark, "no cache", {
        "no cache": lambda: model.encode_image(images),
        "image.embed": lambda: model.run_with_cache(images, sites=["image.embed"]),
        "image.blocks.*.resid_post": lambda: model.run_with_cache(images, sites=["image.blocks.*.resid_post"]),
        "image.blocks.*.attn.z": lambda: model.run_with_cache(images, sites=["image.blocks.*.attn.z"]),
        "image.*": lambda: model.run_with_cache(images, sites=["image.*"]),
    })  # fmt: skip


@pytest.mark.parametrize("n", [1024, 16384])
def test_e_mask_through_a_topk_sae(benchmark, n):
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
        race(benchmark, "best by hand", {
            "best by hand": lambda: nets["hand"](x),
            "mmhooks": lambda: ours(x),
            "double encode": lambda: nets["double"](x),
            "by hand, no error term": lambda: nets["full"](x),
        })  # fmt: skip
