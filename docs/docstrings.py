# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""
Extension of griffe, which reads docstrings in Google's style, for those in Transformers' style.

The type ``(`int`, *optional*, defaults to 8)`` becomes `int`, since the signature has the default. What is written for
`auto_docstring` gets a header.
"""

import re
import textwrap
from typing import Any

import griffe


# A parameter with its type, and the type of a return value.
PARAMETER = re.compile(r"^( +\w+ \()(.*?`.*?)(\):(?: |$))", re.MULTILINE)
RETURNED = re.compile(r"^( +)(`.+?`)(:(?: |$))", re.MULTILINE)


class TransformersDocstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is None:
            return
        text = obj.docstring.value
        if re.match(r"\w+ \(`", text):
            parameters, *rest = text.split("\n\n", 1)
            header = "Attributes" if obj.is_class else "Args"
            text = "\n\n".join([f"{header}:\n{textwrap.indent(parameters, '    ')}", *rest])
            if obj.is_class:  # whose signature lacks inherited fields
                text = text.replace("*optional*, ", "")
        obj.docstring.value = RETURNED.sub(_plain, PARAMETER.sub(_plain, text))


def _plain(match: re.Match[str]) -> str:
    before, type_, after = match.groups()
    type_ = re.sub(r", \*optional\*.*", "", type_)
    return before + type_.replace("`", "") + after
