"""Files that travel with the package: recipes under ``configs``."""

from __future__ import annotations

from importlib.resources import files
from importlib.resources.abc import Traversable


def recipe(name: str) -> Traversable:
    """The packaged configuration called ``name``; ValueError lists what there is."""
    folder = files("roformer_dist.configs")
    found = folder / f"{name}.toml"
    if not found.is_file():
        known = sorted(
            entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")
        )
        raise ValueError(f"no recipe called {name!r}; there are: {', '.join(known)}")
    return found
