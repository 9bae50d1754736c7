"""The workflow around the workers: launchers, data, command line.

A program, ``cosmic``: none of its names is public.
"""

__all__: list[str] = []
