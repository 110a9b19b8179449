"""A paper's own settings as defaults of a study, taken with ``--paper``: what it set, where it says so, what is lacking.

A study lists its paper's settings once (``preset.py``). They are defaults: an option that is given explicitly wins. What
a run used is compared with the list afterwards (:mod:`~mmhooks.studies.common.paper_report`), so the page and
``results.json`` say of every setting whether it was the paper's, was overridden, or could not be had.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, TypeVar

import typer

from mmhooks.errors import MMHooksError

Value = str | int | float | bool | tuple[str, ...] | tuple[float, ...]
OptionsT = TypeVar("OptionsT", bound="PaperOptions")
Paper = Annotated[
    bool,
    typer.Option(
        "--paper", help="The paper's own settings as defaults: options given explicitly win over them."
    ),
]


@dataclass(frozen=True)
class PaperSetting:
    """One part of a paper's setting: an option's value, an input that only the user has, or what no option reaches.

    Attributes:
        paper: what the paper used, in words. source: where it says so.
        option: the option that sets it; None where there is none.
        value: what that option gets; None where the user must give it (a file, a folder).
        lacking: what of the paper's setting is not had even so, and what is used instead.
        stated: False where the paper needs such a value but does not give it, so that ``value`` is ours.
    """

    paper: str
    source: str
    option: str | None = None
    value: Value | None = None
    lacking: str = ""
    stated: bool = True

    def __post_init__(self) -> None:
        if self.value is None and not self.lacking:
            raise MMHooksError(
                f"{self.paper!r}: expected a value, or what is lacking without one, got neither; give lacking="
            )


@dataclass(frozen=True)
class Preset:
    """The settings of one study in its paper."""

    paper: str
    settings: tuple[PaperSetting, ...]

    def defaults(self) -> dict[str, Any]:
        """Returns the values by option, as the study's options take them (lists of their own)."""
        return {
            s.option: list(s.value) if isinstance(s.value, tuple) else s.value
            for s in self.settings
            if s.option is not None and s.value is not None
        }


@dataclass(frozen=True)
class PaperOptions:
    """Base of the options of a study that has a paper; :meth:`of_paper` is ``--paper`` in Python."""

    PAPER: ClassVar[Preset]
    paper: Paper = False

    def __post_init__(self) -> None:
        """Refuses ``Options(paper=True)``, which would run at our defaults under the paper's name.

        Raises:
            MMHooksError: none of the settings that the paper changes has the paper's value.
        """
        ours = {f.name: f.default for f in fields(self)}
        changed = (
            {name: v for name, v in self.PAPER.defaults().items() if v != ours[name]} if self.paper else {}
        )
        if changed and all(getattr(self, name) == ours[name] for name in changed):
            raise MMHooksError(
                "expected options with the paper's settings, got paper=True with our defaults; make them by "
                f"{type(self).__name__}.of_paper(...)"
            )

    @classmethod
    def of_paper(cls: type[OptionsT], **given: Any) -> OptionsT:
        """Returns the paper's settings; what is ``given`` wins over them.

        >>> from mmhooks.studies.modality.options import Options
        >>> options = Options.of_paper(limit=500, activation="abs")
        >>> options.model, options.zeros, options.activation
        ('ViT-B-32', 'keep', 'abs')
        """
        return cls(**{"paper": True} | cls.PAPER.defaults() | given)
