"""A model as a flat list of arrays: what a jitted function takes in no time.

Flattening an NNX module costs the better part of a millisecond in Python, each call, which is twice
what a GPU needs for an image. Where its variables lie is therefore remembered, and only looked up.
Even so each array costs a call half a microsecond, and a call that encodes takes the encoder's.
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import jax
from flax import nnx

from samlight_jax.sam import Sam

ENCODER = ("image_encoder",)
DECODER = ("prompt_encoder", "mask_decoder")


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
        """The model, with these arrays (tracers, inside `jit`); parts left out have None."""
        return jax.tree.unflatten(self.tree, self.arrays)


def flat(model: Sam, parts: tuple[str, ...] = (*ENCODER, *DECODER)) -> Flat:
    """The model as it is now: arrays that were replaced since the last call are the new ones.

    Args:
      model: to be taken apart.
      parts: of it that are needed: `ENCODER` to encode, `DECODER` to decode.
    """
    known = _KNOWN.setdefault(model, {})
    links = known.get(parts)
    if links is None or not links.hold():
        links = known[parts] = _Links(model, parts)
    return Flat(tuple([variable.get_raw_value() for variable in links.variables]), links.tree)


class _Links:
    """Where the variables of a model's parts lie.

    Attributes:
      variables: in the order of its leaves.
      tree: its structure.
    """

    def __init__(self, model: Sam, parts: tuple[str, ...]):
        leaves, tree = jax.tree_util.tree_flatten_with_path(model)
        names = [[_name(key) for key in path] for path, _ in leaves]
        kept = [
            leaf if name[0] in parts else None
            for name, (_, leaf) in zip(names, leaves, strict=True)
        ]
        self.tree = jax.tree.structure(jax.tree.unflatten(tree, kept))
        self.variables: list[nnx.Variable] = []
        links: dict[tuple[int, str], tuple[dict[str, Any], str, Any]] = {}
        for path in names:
            if path[0] not in parts:
                continue
            parent: Any = model
            for name in path[:-1]:  # the last one is of the variable to its array
                child = vars(parent)[name]
                links[id(parent), name] = vars(parent), name, child
                parent = child
            self.variables.append(parent)
        self.links = tuple(links.values())

    def hold(self) -> bool:
        """Whether no part of the model was replaced by another."""
        return all([parts.get(name) is child for parts, name, child in self.links])


def _name(key: Any) -> str:
    """Of an attribute or of a place in a list."""
    return str(getattr(key, "name", getattr(key, "idx", None)))


_KNOWN: weakref.WeakKeyDictionary[Sam, dict[tuple[str, ...], _Links]] = weakref.WeakKeyDictionary()
