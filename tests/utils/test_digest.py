"""One digest of content: equal things agree, in every process; different ones never do."""

from __future__ import annotations

import copy
import functools
import os
import re
import socket
import subprocess
import sys
import threading
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from mmhooks.errors import MMHooksError, NoDigest
from mmhooks.utils.digest import digest

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner)
        | st.frozensets(st.integers() | st.text())
    ),
    max_leaves=12,
)


def _typed(value: Any) -> Any:
    """A value in which everything that tells two values apart is visible to ``==``, by other means than a hash."""
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, [_typed(v) for v in value])
    if isinstance(value, dict):
        return ("dict", [(_typed(k), _typed(v)) for k, v in value.items()])
    if isinstance(value, frozenset):
        return ("set", sorted((type(v).__name__, repr(v)) for v in value))
    return (type(value).__name__, value.hex() if isinstance(value, float) else value)


@settings(max_examples=300)
@given(a=plain, b=plain)
def test_plain_values_are_equal_exactly_where_their_digests_are(a, b):
    assert (digest(a) == digest(b)) == (_typed(a) == _typed(b))
    assert digest(a) == digest(copy.deepcopy(a))


@settings(max_examples=200)
@given(parts=st.lists(st.text(max_size=4), min_size=2, max_size=4), cut=st.integers(1, 3))
def test_nothing_is_said_twice_by_moving_a_boundary(parts, cut):
    joined = "".join(parts)
    assert digest(parts) != digest([joined]) and digest(*parts) != digest(joined)
    if len(joined) > cut:
        pairs = [joined[:cut], joined[cut:]]
        assert (digest(pairs) == digest(parts)) == (pairs == parts)


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_by_type_shape_and_bits_not_by_strides(dtype):
    x = (torch.arange(24).reshape(4, 6) % 3).to(dtype)
    same = [
        x.clone(),
        x.t().contiguous().t(),
        torch.cat([x, x])[:4],
        torch.stack([x, x], -1)[..., 0],
        nn.Parameter(x, False),
    ]
    assert {digest(t) for t in same} == {digest(x)}
    other = x.clone()
    other[3, 5] = 1 - other[3, 5] if dtype != torch.bool else ~other[3, 5]
    different = [
        other,
        x.t(),
        x.reshape(6, 4),
        x.reshape(-1),
        x[None],
        x[:3],
        x.view(torch.uint8) if dtype != torch.uint8 else x.int(),
    ]
    assert len({digest(t) for t in [x, *different]}) == 1 + len(different)
    assert digest(x) != digest(x.tolist())


def test_tensors_of_every_layout():
    x = torch.tensor([[1.0, 0.0], [0.0, -0.0]])
    z = torch.tensor([1 + 2j, 3 - 1j])
    assert digest(z.conj()) == digest(z.conj().resolve_conj()) != digest(z)
    assert digest(torch.zeros(2)) != digest(-torch.zeros(2))  # bits
    assert (
        len({digest(t) for t in (x, x.to_sparse(), x.to_sparse_csr(), torch.empty(0), torch.empty(0, 2))})
        == 5
    )
    q = [torch.quantize_per_tensor(torch.ones(3), s, 0, torch.qint8) for s in (0.5, 0.25)]
    assert digest(q[0]) != digest(q[1]) and digest(q[0]) == digest(q[0].clone())
    with pytest.raises(NoDigest, match="meta device"):
        digest(torch.empty(2, device="meta"))
    with torch.inference_mode():
        assert digest(torch.ones(2)) == digest(torch.tensor([1.0, 1.0]))


def test_arrays():
    x = np.arange(6.0).reshape(2, 3)
    assert digest(x) == digest(np.asfortranarray(x)) == digest(np.stack([x, x])[0])
    others = [
        x.T,
        x.astype(">f8"),
        x.astype("f4"),
        x.reshape(-1),
        np.ma.masked_equal(x, 2),
        x.astype(object),
        torch.tensor(x),
    ]
    assert len({digest(a) for a in [x, *others]}) == 8
    assert (
        len({digest(v) for v in (np.float32(1), np.float64(1), np.array(1.0), 1.0, np.bool_(True), True)})
        == 6
    )
    assert digest(np.ma.masked_equal(x, 2)) != digest(np.ma.masked_equal(x, 3))


class Size(Enum):
    SMALL = 1
    LARGE = 2


@dataclass(frozen=True)
class Options:
    size: int
    names: tuple[str, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)


class Turned:
    """As a preprocessing that a user writes."""

    def __init__(self, by: float) -> None:
        self.by = by

    def __call__(self, x: float) -> float:
        return x + self.by


class Slotted:
    __slots__ = ("a", "b")

    def __init__(self, a: int, b: int) -> None:
        self.a, self.b = a, b


DIFFERENT = {
    "enum": [Size.SMALL, Size.LARGE],
    "dataclass": [Options(1), Options(2), Options(1, ("a",)), Options(1, extra={"a": 1})],
    "callable object": [Turned(0), Turned(90), Turned(0.5)],
    "slots": [Slotted(1, 2), Slotted(2, 1)],
    "partial": [functools.partial(Turned, 1), functools.partial(Turned, by=1), functools.partial(Turned, 2)],
    "method": [Turned(1).__call__, Turned(2).__call__, Turned.__call__],
    "pattern": [re.compile("a"), re.compile("a", re.I), re.compile("b")],
    "path": [Path("a/b"), Path("a/c"), "a/b"],
    "dict order": [{"a": 1, "b": 2}, {"b": 2, "a": 1}, OrderedDict(a=1, b=2)],
    "collections": [deque([1]), deque([1], 3), [1], (1,), {1}, {1: 1}],
    "class": [Options, Turned, nn.Linear, int],
    "torch words": [torch.float32, torch.float16, torch.strided, torch.channels_last, torch.Size([2])],
    "slice": [slice(1, 2), slice(1, 3), range(1, 2)],
    "builtin": [len, max, torch.relu, torch.nn.functional.gelu, np.exp, "a".upper, "b".upper],
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_objects_that_differ(kind):
    values = DIFFERENT[kind]
    assert len({digest(v) for v in values}) == len(values)
    assert [digest(v) for v in values] == [digest(copy.deepcopy(v)) for v in values]


def _made(by: float, name: str = "x") -> list[Any]:
    def inner(x: float, plus: float = by) -> float:
        return x + plus

    return [lambda x: x + by, lambda x, y=by: x + y, inner, lambda x: lambda: x + by]


ANGLE = 0


def _turned_by_global(x: float) -> float:
    return x + ANGLE


def test_functions_by_code_defaults_and_closure():
    first, again, other = _made(1), _made(1), _made(2)
    assert [digest(f) for f in first] == [digest(f) for f in again]
    assert not {digest(f) for f in first} & {digest(f) for f in other}
    assert len({digest(f) for f in first}) == 4
    assert digest(lambda x: x + 1) != digest(lambda x: x - 1) != digest(lambda x: x - 2)


def test_functions_by_the_globals_that_they_read(monkeypatch):
    before = digest(_turned_by_global), digest(lambda x: _turned_by_global(x))
    monkeypatch.setattr(sys.modules[__name__], "ANGLE", 90)
    after = digest(_turned_by_global), digest(lambda x: _turned_by_global(x))
    assert not set(before) & set(after)
    monkeypatch.undo()
    assert digest(_turned_by_global) == before[0]


def test_classes_by_their_code():
    def made(sign: int) -> type:
        if sign > 0:

            class Cleaned:
                def __call__(self, x: str) -> str:
                    return x.strip()
        else:

            class Cleaned:
                def __call__(self, x: str) -> str:
                    return x.lower()

        return Cleaned

    a, b = made(1), made(-1)
    assert digest(a()) != digest(b()) and digest(made(1)()) == digest(a())
    assert digest(type("Sub", (a,), {})()) != digest(type("Sub", (b,), {})())


def test_cached_properties_are_no_content():
    class Lazy:
        def __init__(self) -> None:
            self.x = 1

        @functools.cached_property
        def twice(self) -> int:
            return 2 * self.x

    lazy = Lazy()
    before = digest(lazy)
    assert lazy.twice == 2 and digest(lazy) == before


@pytest.mark.parametrize("made", [lambda: socket.socket(), threading.Lock, lambda: (i for i in range(3))])
def test_what_has_no_content_is_named_and_may_be_vouched_for(made):
    opaque = made()
    captured = {"steps": [1, lambda x: (x, opaque)]}
    for value, where in ((opaque, "preprocess"), (captured, r"preprocess\['steps'\]\[1\]\(.*\)\.opaque")):
        with pytest.raises(NoDigest, match=rf"^{where} .*pass key=") as caught:
            digest(value, what="preprocess")
        assert isinstance(caught.value, MMHooksError)
        keyed = [digest(value, key=key) for key in ("a", "a", "b")]
        assert keyed[0] == keyed[1] != keyed[2]
    assert digest({**captured, "more": 1}, key="a") != digest(captured, key="a")  # the rest still counts


def test_cycles_end():
    a: list[Any] = [1]
    a.append(a)
    b: list[Any] = [2]
    b.append(b)
    assert digest(a) == digest(copy.deepcopy(a)) != digest(b)
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(NoDigest, match="nested too deeply"):
        digest(deep)


def test_every_process_agrees():
    code = (
        "import torch, numpy as np, re; from functools import partial; from torch import nn; "
        "from mmhooks.utils.digest import digest; torch.manual_seed(0); "
        "print(digest({'a', 'b', 'c'}, frozenset('xyz'), nn.Linear(2, 2), lambda x: x in {'q', 'r', 's'}, partial(min, 1), "
        "re.compile('a'), np.ones(2), nn.MultiheadAttention))"
    )
    seen = {
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True,
                       text=True, check=True).stdout
        for seed in ("0", "1", "77")
    }  # fmt: skip
    assert len(seen) == 1 and len(seen.pop().strip()) == 64


# -- torch modules -----------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, scale: float = 1.0, act: Any = torch.relu) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1))
        self.register_buffer("kept", torch.zeros(2))
        self.register_buffer("hidden", torch.zeros(2), persistent=False)
        self.scale, self.act, self.lock = scale, act, threading.Lock()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.b(self.a(x))) * self.scale


def _with(change: Any) -> Net:
    net = Net()
    change(net)
    return net


def _lora(net: Net) -> None:
    class Low(nn.Module):
        def forward(self, w: torch.Tensor) -> torch.Tensor:
            return w + 1

    parametrize.register_parametrization(net.a, "weight", Low(), unsafe=True)


CHANGES = {
    "parameter": lambda n: n.a.weight.data[0, 0].add_(1e-7),
    "buffer": lambda n: n.kept.add_(1),
    "hidden buffer": lambda n: n.hidden.add_(1),
    "dtype": lambda n: n.a.half(),
    "attribute": lambda n: setattr(n, "scale", 2.0),
    "activation": lambda n: setattr(n, "act", torch.tanh),
    "lambda": lambda n: setattr(n, "act", lambda x: x),
    "dropout": lambda n: setattr(n.b[1], "p", 0.2),
    "swapped class": lambda n: setattr(n.b, "1", nn.AlphaDropout(0.1)),
    "more": lambda n: n.b.append(nn.Identity()),
    "order": lambda n: setattr(n, "b", nn.Sequential(n.b[1], n.b[0])),
    "their hook": lambda n: n.a.register_forward_hook(lambda m, i, o: o * 2),
    "parametrised": _lora,
    "weight norm": lambda n: nn.utils.parametrizations.weight_norm(n.a),
    "forward of its own": lambda n: setattr(n.a, "forward", lambda x: x),
    "quantised": lambda n: torch.ao.quantization.quantize_dynamic(n, {nn.Linear}, inplace=True),
}


@pytest.mark.parametrize("name", CHANGES)
def test_modules_by_everything_that_runs(name):
    assert digest(_with(CHANGES[name])) != digest(Net())


def test_modules_are_the_same_after_running_moving_and_changing_modes():
    net, same = Net(), Net()
    net(torch.ones(1, 4))
    net.eval().requires_grad_(False)
    net.double().float()
    assert digest(net) == digest(same) == digest(copy.deepcopy(same, {id(same.lock): same.lock}))


def test_two_differently_quantised_models_differ():
    def quantised(by: float) -> nn.Module:
        net = nn.Sequential(nn.Linear(4, 4, bias=False))
        with torch.no_grad():
            net[0].weight.copy_(torch.arange(16.0).view(4, 4) * by)
        return torch.ao.quantization.quantize_dynamic(net, {nn.Linear})

    assert digest(quantised(1)) != digest(quantised(2)) and digest(quantised(1)) == digest(quantised(1))


def test_tensor_subclasses_by_what_they_are_made_of():
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def made(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(64, 64, dtype=torch.bfloat16))
        quantize_(net, Int8WeightOnlyConfig())
        return net

    assert digest(made(0)) == digest(made(0)) != digest(made(1))


def test_open_contexts_of_ours_change_nothing():
    import mmhooks as mm

    model = mm.load("mini")
    before = digest(model.model)
    with (
        model.hooks(mm.Zero([0], at="image.blocks.0.attn.z"), strict=False),
        model.caching("*", strict=False),
    ):
        assert digest(model.model) == before
    with torch.no_grad():
        model.encode_image(torch.zeros(1, 3, 64, 64))
    assert digest(model.model) == before
