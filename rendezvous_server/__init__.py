"""Brings the ranks of a job together, so that they can punch TCP holes to each other.

A program, ``python -m rendezvous_server``: none of its names is public.
"""

__all__: list[str] = []
