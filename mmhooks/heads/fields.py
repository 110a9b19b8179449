"""The types of a head's constructor arguments, as a file must give them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any


def faults_of_fields(config: Mapping[str, Any]) -> list[str]:
    """What is wrong with the values of known fields, in words; unknown fields are not judged.

    >>> faults_of_fields({"d_in": 8, "k": "four"})
    ["k must be a whole number from 1 on, got 'four'"]
    """
    return [
        f"{name} must be {FIELDS[name][0]}, got {value!r}"
        for name, value in config.items()
        if name in FIELDS and not FIELDS[name][1](value)
    ]


def _is_positive_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_list_of_levels(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(_is_positive_int(v) for v in value))


FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(
        ("d_in", "d_out", "n_features", "k", "hidden", "n_points"),
        ("a whole number from 1 on", _is_positive_int),
    ),
    **dict.fromkeys(("widths", "ks"), ("null or a list of whole numbers", _is_list_of_levels)),
    "normalize_input": ('true, false or "layer_norm"', lambda v: isinstance(v, bool) or v == "layer_norm"),
    **dict.fromkeys(("decoder", "skip"), ("true or false", lambda v: isinstance(v, bool))),
    "activation": ("topk, relu or jumprelu", lambda v: v in ("topk", "relu", "jumprelu")),
    "delta": ("a number from 0 on", lambda v: type(v) in (int, float) and 0 <= v < math.inf),
    "bandwidth": ("a number above zero", lambda v: type(v) in (int, float) and 0 < v < math.inf),
}
