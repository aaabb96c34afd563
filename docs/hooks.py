"""Hooks of the documentation's build: formulas become MathML, which browsers show by themselves.

A formula is a fence of the language `math`, in TeX, as GitHub shows it.
"""

from __future__ import annotations

from typing import Any

from latex2mathml.converter import convert


def on_config(config: Any) -> Any:
    """Adds the fence to those of pymdownx.superfences."""
    options = config.mdx_configs.setdefault("pymdownx.superfences", {})
    fences = options.setdefault("custom_fences", [])
    fences.append({"name": "math", "class": "formula", "format": formula})
    return config


def formula(source: str, language: str, css_class: str, *_args: Any, **_kwargs: Any) -> str:
    """The fence's TeX as MathML."""
    del language
    return f'<div class="{css_class}">{convert(source, display="block")}</div>'
