"""All targets, by name."""

from tests.reliability.fuzz import files, peers, wire
from tests.reliability.fuzz.target import TARGETS

__all__ = ["TARGETS", "files", "peers", "wire"]
