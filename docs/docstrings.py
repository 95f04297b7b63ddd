# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Extension of griffe, which reads docstrings: ``(`int`, *optional*, defaults to 8)`` becomes the type `int`."""

import re
from typing import Any

import griffe


# A parameter with its type, and the type of a return value.
PARAMETER = re.compile(r"^( +\w+ \()(.*?`.*?)(\):(?: |$))", re.MULTILINE)
RETURNED = re.compile(r"^( +)(`.+?`)(:(?: |$))", re.MULTILINE)


class TransformersDocstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = RETURNED.sub(_plain, PARAMETER.sub(_plain, obj.docstring.value))


def _plain(match: re.Match[str]) -> str:
    before, type_, after = match.groups()
    type_ = re.sub(r", \*optional\*.*", "", type_)  # the default is that of the signature
    return before + type_.replace("`", "") + after
