"""A link that swallows everything is noticed within 15 s, whatever its ranks are doing."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.net.lab import ROOT, Lab, Nat, Site, build, why_not
from tests.reliability.conftest import Measured

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(why_not() is not None, reason=f"{why_not()}"),
    pytest.mark.row(9),
]

LIMIT = 15.0
"""Seconds, of which a second is for the server's word on who died."""

CASES = {
    "both wait": ("receive", "receive"),
    "both send and wait": ("exchange", "exchange"),
    "one sends much, the other waits": ("send", "receive"),
    "one waits, the other computes": ("receive", "compute"),
    "one sends much, the other computes": ("send", "compute"),
    "one computes with data on its way": ("told", "compute"),
    "both compute": ("compute", "compute"),
}


def start(lab: Lab, number: int, what: str, driver: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "tests.reliability.hole", lab.server, str(number), what, driver]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        lab.hosts[number].command(*words), cwd=ROOT, stdin=pipe, stdout=pipe, text=True
    )
