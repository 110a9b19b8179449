"""Progress on standard error: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import pytest

from mmhooks.utils import progress


def test_a_log_file_gets_lines_before_the_end(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 10.0, 40.0, 50.0, 80.0, 100.0])
    monkeypatch.setattr(progress, "monotonic", lambda: next(clock))  # not that of the bar
    with progress.rate_bar("drawing", 100, unit="images") as advance:
        told = []
        for done in (20, 20, 20, 20, 20):
            advance(done)
            told.append(capfd.readouterr().err.strip())
    assert told == [
        "",  # ten seconds in
        "drawing: 40 of 100 images, 1.0 images/s, 1.0 min left",
        "",
        "drawing: 80 of 100 images, 1.0 images/s, 0.3 min left",
        "",  # at the end the bar itself is written
    ]
    assert "100/100" in capfd.readouterr().err


def test_nothing_is_written_where_nothing_is_to_be_shown(capfd: pytest.CaptureFixture[str]) -> None:
    with progress.rate_bar("drawing", 2, unit="images", show=False) as advance:
        advance(2)
    assert list(progress.track([1, 2], 2, "x", show=False)) == [1, 2]
    assert capfd.readouterr().err == ""
