"""A folder for one process at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from workflow.alone import Taken, alone


def test_who_is_refused_leaves_the_folder_to_the_first(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "mine"
    with alone(folder, "take another"):
        second = alone(folder, "take another")  # a lock of its own, as of another process
        with pytest.raises(Taken, match="mine: another process is writing there: wait for it, or"):
            second.__enter__()
        (folder / "result").touch()
    assert (folder / "result").exists()


def test_a_folder_in_which_nothing_came_about_goes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="too much"), alone(tmp_path / "mine", ""):
        raise ValueError("too much")
    assert list(tmp_path.iterdir()) == []
    with alone(tmp_path / "mine", ""):  # and is free again
        pass
