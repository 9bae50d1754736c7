"""The lab's tests need root and a few tools; elsewhere they skip, with one line for all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.net.lab import why_not

HERE = Path(__file__).parent


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the first of ours and leave the rest out, if no lab can be built."""
    ours = [item for item in items if HERE in item.path.parents]
    reason = why_not() if ours else None
    if reason is not None:
        ours[0].add_marker(pytest.mark.skip(reason=reason))
        config.hook.pytest_deselected(items=ours[1:])
        items[:] = [item for item in items if item not in ours[1:]]
