"""Griffe extension: show Sphinx roles of docstrings (:func:`name`) as inline code."""

import re

import griffe

ROLE = re.compile(r":\w+:(`[^`]+`)")


class SphinxRoles(griffe.Extension):
    """Replace roles in the docstring of every object."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring:
            obj.docstring.value = ROLE.sub(r"\1", obj.docstring.value)
