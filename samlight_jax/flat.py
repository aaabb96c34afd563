"""A model as a flat list of arrays: what a jitted function takes in no time.

Flattening an NNX module costs the better part of a millisecond in Python, each call, which is twice
what a GPU needs for an image. Where its variables lie is therefore remembered, and only looked up.
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import jax
from flax import nnx

from samlight_jax.sam import Sam


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Flat:
    """A model's arrays and its structure.

    Attributes:
      arrays: its leaves.
      tree: how they make up the model.
    """

    arrays: tuple[Any, ...]
    tree: Any = dataclasses.field(metadata={"static": True})

    def model(self) -> Sam:
        """The model, with these arrays (tracers, inside `jit`)."""
        return jax.tree.unflatten(self.tree, self.arrays)


def flat(model: Sam) -> Flat:
    """The model as it is now: arrays that were replaced since the last call are the new ones."""
    links = _KNOWN.get(model)
    if links is None or not links.hold():
        links = _KNOWN[model] = _Links(model)
    return Flat(tuple([variable.get_raw_value() for variable in links.variables]), links.tree)


class _Links:
    """Where a model's variables lie.

    Attributes:
      variables: in the order of its leaves.
      tree: its structure.
    """

    def __init__(self, model: Sam):
        leaves, self.tree = jax.tree_util.tree_flatten_with_path(model)
        self.variables: list[nnx.Variable] = []
        links: dict[tuple[int, str], tuple[dict[str, Any], str, Any]] = {}
        for path, _ in leaves:
            parent: Any = model
            for key in path[:-1]:  # the last one is of the variable to its array
                name = str(getattr(key, "name", getattr(key, "idx", None)))
                child = vars(parent)[name]
                links[id(parent), name] = vars(parent), name, child
                parent = child
            self.variables.append(parent)
        self.links = tuple(links.values())

    def hold(self) -> bool:
        """Whether no part of the model was replaced by another."""
        return all([parts.get(name) is child for parts, name, child in self.links])


_KNOWN: weakref.WeakKeyDictionary[Sam, _Links] = weakref.WeakKeyDictionary()
