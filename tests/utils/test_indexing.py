"""One reading of "features", "tokens", "rows", "neurons" and "layers", in every form and at every place that takes them."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import mmhooks as mm
from mmhooks.analysis.interventions.mean_ablation import Parts
from mmhooks.data.pair_set import Pairs, Row
from mmhooks.errors import MMHooksError, NotFinite, ShapeMismatch
from mmhooks.hooks.step_cache import StepCache
from mmhooks.hooks.steps import moment

N = 7
MASK = [False, True, False, False, True, False, True]
CHOSEN = [1, 4, 6]

MASKS = {
    "torch": lambda m: torch.tensor(m),
    "numpy": lambda m: np.array(m),
    "list": list,
    "tuple": tuple,
    "list of numpy bools": lambda m: [np.bool_(x) for x in m],
    "list of tensors": lambda m: [torch.tensor(x) for x in m],
    "numpy objects": lambda m: np.array(m, dtype=object),
    "generator": lambda m: (x for x in m),
    "reversed view": lambda m: np.array(m[::-1])[::-1],
    "dict values": lambda m: OrderedDict(enumerate(m)).values(),
}
NUMBERS = {
    "torch": lambda i: torch.tensor(i, dtype=torch.long),
    "int32": lambda i: torch.tensor(i, dtype=torch.int32),
    "uint8": lambda i: torch.tensor(i, dtype=torch.uint8),
    "numpy": lambda i: np.array(i, dtype=np.int64),
    "numpy uint16": lambda i: np.array(i, dtype=np.uint16),
    "list": list,
    "tuple": tuple,
    "set": set,
    "dict": lambda i: dict.fromkeys(i).keys(),
    "list of numpy ints": lambda i: [np.int8(x) for x in i],
    "list of tensors": lambda i: [torch.tensor(x) for x in i],
    "generator": lambda i: (x for x in i),
    "numpy objects": lambda i: np.array(i, dtype=object),
}
NONE_OF_THEM = {
    "float mask": lambda: torch.tensor(MASK).float(),
    "numpy float mask": lambda: np.array(MASK, dtype=np.float32),
    "list of floats": lambda: [0.0, 1.0, 1.0],
    "numpy floats in a list": lambda: [np.float32(1.0)],
    "half": lambda: torch.ones(N).half(),
    "one float": lambda: np.float64(1.0),
    "complex": lambda: np.ones(N, dtype=complex),
    "bools and numbers": lambda: [True, 2, False],
    "numpy bools and numbers": lambda: [np.True_, 1],
    "text": lambda: "0,1",
    "texts": lambda: ["1", "2"],
    "a mapping": lambda: {1: True},
    "None inside": lambda: [1, None],
    "one bool": lambda: np.True_,
    "ragged": lambda: [[1], [2, 3]],
    "mask too short": lambda: np.array(MASK[:-1]),
    "mask too long": lambda: [*MASK, True],
    "empty mask": lambda: np.zeros(0, dtype=bool),
    "beyond": lambda: [N],
    "far beyond": lambda: np.array([2**63], dtype=np.uint64),
    "below": lambda: [-N - 1],
}


def ones() -> torch.Tensor:
    return torch.ones(2, N, N)


def edited(edit: mm.Zero, axis: int) -> list[int]:
    """Which features (2) or tokens (1) an edit by hand set to zero."""
    return (edit(ones()) == 0).any(3 - axis).any(0).nonzero().flatten().tolist()


@pytest.fixture(scope="module")
def sae() -> mm.TopKSAE:
    return mm.TopKSAE(4, N, 3)


class Pictures:
    """Grey pictures, made when they are asked for."""

    def open(self, picture):
        return Image.new("RGB", (2, 2), (int(picture),) * 3)


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    rows = [Row(f"p{i}", f"picture {i}", i) for i in range(N)]
    return Pairs(rows, Pictures(), name="grey", content="grey")


def _masked(sae: mm.TopKSAE, features) -> list[int]:
    from mmhooks.analysis.interventions.masked_classification import Masked

    samples = Masked(sae, torch.randn(9, 4, generator=torch.Generator().manual_seed(0)))
    samples.latents = torch.ones(9, N)
    return (samples.vectors(features, "latent")[0] == 0).nonzero().flatten().tolist()


def _aligned(features) -> list[int]:
    from mmhooks.analysis.attacks.align import _mask

    return _mask(features, 3, N, "").flatten().nonzero().flatten().tolist()


SETS = {  # features and tokens: which of N are chosen, in no order
    "FeatureSet": lambda x, sae: list(mm.FeatureSet(x, N)),
    "Zero": lambda x, sae: edited(mm.Zero(x), 2),
    "Patch": lambda x, sae: edited(mm.Patch(torch.zeros(N), x), 2),
    "Clamp": lambda x, sae: edited(mm.Clamp(x, value=0), 2),
    "tokens=": lambda x, sae: edited(mm.Zero(tokens=x), 1),
    "Masked.vectors": lambda x, sae: _masked(sae, x),
    "align": lambda x, sae: _aligned(x),
}


@pytest.mark.parametrize("place", SETS)
@pytest.mark.parametrize("form", MASKS)
def test_a_mask_of_any_kind_is_a_mask(place, form, sae) -> None:
    assert SETS[place](MASKS[form](MASK), sae) == CHOSEN


@pytest.mark.parametrize("place", SETS)
@pytest.mark.parametrize("form", NUMBERS)
def test_whole_numbers_of_any_kind_are_indices(place, form, sae) -> None:
    assert SETS[place](NUMBERS[form](CHOSEN), sae) == CHOSEN


@pytest.mark.parametrize("place", SETS)
@pytest.mark.parametrize("form", NONE_OF_THEM)
def test_other_input_is_refused(place, form, sae) -> None:
    with pytest.raises(ShapeMismatch, match="expected|outside|among|mask|features?|token|dimension"):
        SETS[place](NONE_OF_THEM[form](), sae)


@pytest.mark.parametrize("place", SETS)
def test_a_mask_that_lost_its_type_is_refused(place, sae) -> None:
    """As many 0s and 1s as there are: a tokenizer's attention mask, or a mask times 1."""
    for mask in (
        torch.tensor(MASK).long(),
        torch.tensor(MASK).byte(),
        np.array(MASK) * 1,
        [int(x) for x in MASK],
    ):
        with pytest.raises(ShapeMismatch, match=r"bool.*|zeros and ones"):
            SETS[place](mask, sae)
    assert SETS[place]([0, 1], sae) == [0, 1] == SETS[place]([1, 0, 1], sae)  # few of many: indices


@pytest.mark.parametrize("number", [3, np.int64(3), np.uint8(3), torch.tensor(3), torch.tensor([3])])
def test_one_number_is_one_feature_or_token(number) -> None:
    assert edited(mm.Zero(number), 2) == [3] == edited(mm.Zero(tokens=number), 1)
    assert number in mm.FeatureSet([3], N) and number not in mm.FeatureSet([2], N)


def test_nothing_chosen_is_nothing() -> None:
    for empty in ([], (), np.array([]), torch.tensor([]), torch.zeros(0, dtype=torch.long), set()):
        assert edited(mm.Zero(empty), 2) == [] == list(mm.FeatureSet(empty, N))


def test_negative_numbers_count_from_the_end_where_there_is_an_order() -> None:
    assert edited(mm.Zero(tokens=np.array([-1, -7])), 1) == [0, 6]
    for make in (mm.Zero, lambda x: mm.FeatureSet(x, N)):
        with pytest.raises(ShapeMismatch, match="-1"):
            make(np.array([-1]))


@given(st.lists(st.booleans(), min_size=1, max_size=30))
def test_a_mask_and_its_indices_are_one(mask) -> None:
    want = [i for i, chosen in enumerate(mask) if chosen]
    for form in MASKS.values():
        assert list(mm.FeatureSet(form(mask), len(mask))) == want
    assert list(mm.FeatureSet(want, len(mask))) == want


# -- rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", MASKS)
def test_rows_of_pairs_by_mask(pairs, form) -> None:
    assert pairs.select(MASKS[form](MASK)).ids == [pairs.ids[i] for i in CHOSEN]
    assert pairs[MASKS[form](MASK)].ids == [pairs.ids[i] for i in CHOSEN]
    assert len(pairs.images()[MASKS[form](MASK)]) == 3


@pytest.mark.parametrize("form", [f for f in NUMBERS if f != "set"])
def test_rows_of_pairs_by_number(pairs, form) -> None:
    order = [4, 1, 6]
    assert pairs.select(NUMBERS[form](order)).ids == [pairs.ids[i] for i in order]


@pytest.mark.parametrize("form", NONE_OF_THEM)
def test_rows_of_pairs_that_are_refused(pairs, form) -> None:
    with pytest.raises(MMHooksError, match="pairs"):
        pairs.select(NONE_OF_THEM[form]())


def test_one_pair(pairs) -> None:
    assert pairs[np.int64(2)].id == pairs[2].id == pairs[torch.tensor(-5)].id == pairs.ids[2]
    with pytest.raises(ShapeMismatch, match="single bool"):
        _ = pairs[True]


@pytest.mark.parametrize("bad", [True, np.True_, torch.tensor(False), 1.0, [0, 1], N, "1", None])
def test_one_of_several_is_a_whole_number(pairs, bad) -> None:
    """Where a single feature, row or layer is asked for, a bool is not 0 or 1."""
    found = mm.top_activating(torch.eye(N), m=2)
    for pick in (found.of, pairs.image, pairs.rgba, _coded().top, _second_order):
        with pytest.raises(ShapeMismatch):
            pick(bad)


def test_one_of_several_from_the_end_where_there_is_an_order(pairs) -> None:
    assert pairs.image(np.int64(-1)).getpixel((0, 0)) == (6, 6, 6)
    assert _coded().top(-1) == _coded().top(torch.tensor(N - 1)) == [("t6", 1.0)]
    found = mm.top_activating(torch.eye(N), m=2)
    assert found.of(np.uint8(6)).tolist() == [6]
    with pytest.raises(ShapeMismatch, match="-1 of 7"):
        found.of(-1)


def _coded():
    from mmhooks.analysis.decomposition.sparse_text_code import SparseTextCode
    from mmhooks.data.sparse_rows import SparseRows

    codes = SparseRows(torch.ones(N, 1), torch.arange(N)[:, None], N)
    texts = tuple(f"t{i}" for i in range(N))
    return SparseTextCode(
        texts, codes, torch.ones(N), torch.ones(N), torch.zeros(N), 0.1, torch.eye(N), torch.zeros(N)
    )


def _second_order(layer):
    from mmhooks.analysis.decomposition.second_order import second_order

    return second_order(mm.load("mini"), torch.zeros(1, 3, 64, 64), layer=layer, neurons=[0])


# -- parts of a tower that an ablation takes ---------------------------------------------------------------------


@pytest.mark.parametrize("form", MASKS)
def test_parts_by_mask(form) -> None:
    assert list(Parts("", mlps=MASKS[form](MASK)).mlps) == CHOSEN


@pytest.mark.parametrize("form", [f for f in NUMBERS if f != "set"])
def test_parts_by_number(form) -> None:
    assert list(Parts("", mlps=NUMBERS[form]([4, 1, 6])).mlps) == [4, 1, 6]
    assert Parts("", mlps=3).mlps == (3,) and Parts("", mlps=[2, 2]).mlps == (2,)


@pytest.mark.parametrize("form", [torch.tensor, np.array, list, lambda m: [np.array(row) for row in m]])
def test_attention_heads_by_mask_and_by_pair(form) -> None:
    mask, pairs = [[False, True], [True, False], [False, False]], [(0, 1), (1, 0)]
    assert Parts("", heads=form(mask)).heads == Parts("", heads=form(pairs)).heads == tuple(pairs)
    assert Parts("", heads=form([*pairs, pairs[0]])).heads == tuple(pairs)


@pytest.mark.parametrize(
    "form", [f for f in NONE_OF_THEM if f not in ("mask too short", "mask too long", "beyond")]
)
def test_parts_that_are_none(form) -> None:
    with pytest.raises(ShapeMismatch, match="mlps|names"):
        Parts("", mlps=NONE_OF_THEM[form]()).check(N, 2)


@pytest.mark.parametrize(
    "bad", [{"mlps": MASK[:-1]}, {"mlps": [N]}, {"mlps": -1}, {"heads": [[True, False]]}, {"heads": (3, 1)},
            {"heads": [(1, 2, 3)]}, {"heads": [True, False]}, {"heads": [(0, 2)]}, {"heads": [(0, 0.0)]}, {"mlps": [[1]]}]
)  # fmt: skip
def test_parts_of_another_tower_are_refused(bad) -> None:
    with pytest.raises(ShapeMismatch, match="heads|mlps|names"):
        Parts("", **bad).check(N, 2)


# -- steps of a diffusion run ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [np.array, tuple, torch.tensor, iter, lambda s: s[0]])
def test_steps_in_any_form(form) -> None:
    edit = mm.Zero(steps=form([1]))
    for _ in range(2):  # an iterator is read once
        with moment(0, None):
            assert edit(torch.ones(1, 3)).all()
        with moment(1, None):
            assert not edit(torch.ones(1, 3)).any()


@pytest.mark.parametrize("steps", [[True, False], np.array([False, True]), [0.0, 1.0], [-1], "1"])
def test_steps_that_are_none(steps) -> None:
    with pytest.raises(ShapeMismatch, match="steps"):
        mm.Zero(steps=steps)
    with pytest.raises(ShapeMismatch, match="steps"):
        StepCache(steps=steps)


# -- numbers that edits are given --------------------------------------------------------------------------------

NUMBER = {
    "float32": np.float32(0.5),
    "float64": np.float64(0.5),
    "float16": np.float16(0.5),
    "0-d array": np.array(0.5),
    "0-d tensor": torch.tensor(0.5),
    "row": np.full(3, 0.5),
    "list": [0.5, 0.5, 0.5],
    "float64 row": np.full(3, 0.5, dtype=np.float64),
    "read-only": np.broadcast_to(np.float32(0.5), (3,)),
    "tensor": torch.full((3,), 0.5),
}
TAKES = {
    "Mean": lambda v: mm.Mean(mean=v),
    "Interpolate": lambda v: mm.Interpolate(toward=v),
    "Steer direction": lambda v: mm.Steer(direction=v),
    "Steer strength": lambda v: mm.Steer(strength=v),
    "Interpolate strength": lambda v: mm.Interpolate(toward=1.0, strength=v),
    "Clamp": lambda v: mm.Clamp(value=v),
    "Clamp max": lambda v: mm.Clamp(max=v),
    "Clamp both": lambda v: mm.Clamp(min=0.0, max=v),
    "Patch": lambda v: mm.Patch(v),
    "Patch of a cache": lambda v: mm.Patch({"tensor": v}),
    "named": lambda v: mm.Steer([0, 1, 2], strength=v),
    "named clamp": lambda v: mm.Clamp([0, 1, 2], max=v),
}


@pytest.mark.parametrize("edit", TAKES)
@pytest.mark.parametrize("form", NUMBER)
def test_numbers_of_any_kind(edit, form) -> None:
    x = torch.tensor([[1.0, -1.0, 2.0]])
    assert torch.equal(TAKES[edit](NUMBER[form])(x), TAKES[edit](0.5)(x))
    assert TAKES[edit](NUMBER[form])(x.half()).dtype == torch.float16


def test_a_number_for_each_feature_goes_with_the_features() -> None:
    each = np.array([1.0, 2.0, 3.0, 4.0])
    assert mm.Steer([1, 3], strength=each)(torch.zeros(1, 4)).tolist() == [[0, 2, 0, 4]]
    assert mm.Clamp([1, 3], max=each)(torch.full((1, 4), 9.0)).tolist() == [[9, 2, 9, 4]]


@pytest.mark.parametrize("edit", [e for e in TAKES if not e.startswith("Patch")])
@pytest.mark.parametrize(
    "bad",
    [float("nan"), np.float32("nan"), np.array(np.nan), np.array([0, np.nan, 1]), [0.0, float("nan"), 1.0]],
)
def test_nan_of_any_kind_is_refused(edit, bad) -> None:
    with pytest.raises(NotFinite, match="NaN"):
        TAKES[edit](bad)


@pytest.mark.parametrize("edit", ["Steer strength", "Mean", "Interpolate", "Steer direction"])
def test_infinity_is_refused_except_as_a_bound(edit) -> None:
    with pytest.raises(NotFinite, match="infinity"):
        TAKES[edit](np.float32("inf"))
    assert mm.Clamp(max=np.float64("inf"), min=0)(torch.tensor([-1.0, 3.0])).tolist() == [0, 3]


@pytest.mark.parametrize("bad", ["0.5", 1j, np.array(["a"]), object()])
def test_values_that_are_not_numbers(bad) -> None:
    with pytest.raises(ShapeMismatch, match=r"direction=.*expected a number"):
        mm.Steer(direction=bad)
