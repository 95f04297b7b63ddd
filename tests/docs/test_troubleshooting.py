# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Each message that a user can meet is in docs/troubleshooting.md, and each entry there is in the source."""

import ast
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from florence_vl_hf.conversion.original_config import Assumption


ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
# From this heading on, messages are those of other libraries.
OTHER_LIBRARIES = "\n## Other libraries\n"
# Messages that no user meets, and why.
INTERNAL: dict[str, str] = {}
# What is called with a message, in addition to what is raised: errors that are returned, and functions that print.
CALLS = re.compile(r"\w*Error|[wW]arning|exit|torch_compilable_check")
# Expressions by the name of the variable that they are assigned to.
Scope = dict[str, list[ast.expr]]


def texts(node: ast.AST, scope: Scope) -> list[str]:
    """Return the texts that an expression can be, with … in place of what is known at run time only."""
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.JoinedStr(values=parts):
            return ["".join(pieces) for pieces in product(*(texts(part, scope) for part in parts))]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return ["".join(pieces) for pieces in product(texts(left, scope), texts(right, scope))]
        case ast.IfExp(body=body, orelse=orelse):
            return texts(body, scope) + texts(orelse, scope)
        case ast.FormattedValue(value=ast.Name() as name, conversion=-1, format_spec=None):
            return texts(name, scope)
        case ast.Name(id=name):
            earlier = [value for value in scope.get(name, []) if (value.end_lineno or 0) < node.lineno]
            return texts(max(earlier, key=lambda value: value.lineno), scope) if earlier else ["…"]
    return ["…"]


def messages_of(node: ast.AST, scope: Scope) -> Iterator[str]:
    """Yield the messages of a module or a part of it."""
    if isinstance(node, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef):
        own: Scope = {}
        for statement in node.body if isinstance(node, ast.Module) else ast.walk(node):
            match statement:
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    own.setdefault(name, []).append(value)
        scope = scope | own
    match node:
        case ast.Raise(exc=ast.Call(args=arguments)):
            pass
        case ast.Call(func=function, args=arguments) if CALLS.fullmatch(ast.unparse(function).rpartition(".")[2]):
            pass
        case ast.Call(args=arguments, keywords=[ast.keyword(arg="err")]):
            pass
        case _:
            arguments = []
    yield from (text for argument in arguments for text in texts(argument, scope))
    for child in ast.iter_child_nodes(node):
        yield from messages_of(child, scope)


def modules() -> Iterator[tuple[Path, ast.Module]]:
    """Yield the modules of the source; a chat template as one of the messages that it raises."""
    for path in sorted((ROOT / "src").rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted((ROOT / "src").rglob("*.jinja")):
        raised = re.findall(r"raise_exception(\(.+?\)) -", path.read_text(encoding="utf-8"))
        yield path, ast.parse("\n".join(f"raise ValueError{text}" for text in raised))


def normalize(text: str) -> str:
    """Return the first line of a message."""
    return re.sub("…+", "…", text.strip().partition("\n")[0])


def longest_part(text: str) -> str:
    """Return the longest fixed part of a message."""
    return max(text.split("…"), key=len).strip()


def source_messages() -> dict[str, str]:
    """Return the messages of the source, and the file of each. Those without any words are not listed."""
    found = {str(assumption): "src/florence_vl_hf/conversion/original_config.py" for assumption in Assumption}
    for path, module in modules():
        found |= dict.fromkeys(messages_of(module, {}), path.relative_to(ROOT).as_posix())
    return {normalize(text): file for text, file in found.items() if re.search("[a-z]{4}", longest_part(text))}


def source_texts() -> set[str]:
    """Return all strings of the source, also those that no message is recognized in, but no docstrings."""
    found = set()
    for _, module in modules():
        docstrings = {id(node.value) for node in ast.walk(module) if isinstance(node, ast.Expr)}
        for node in ast.walk(module):
            if isinstance(node, ast.Constant | ast.JoinedStr) and id(node) not in docstrings:
                found |= {normalize(text) for text in texts(node, {})}
    return found


def page_messages() -> list[str]:
    """Return the messages of this package on the page: code in the first cell of a row."""
    page, separator, _ = PAGE.read_text(encoding="utf-8").partition(OTHER_LIBRARIES)
    assert separator
    cells = re.findall(r"^\| (`.+?) \| ", page, flags=re.MULTILINE)
    return [normalize(code) for cell in cells for _, code in re.findall(r"(`+) ?(.+?) ?\1(?=<br>|$)", cell)]


def matches(entry: str, messages: str) -> bool:
    """Whether an entry of the page is one of the messages of the source, a line each, or a part of one."""
    return re.search(".*".join(map(re.escape, entry.strip("…").split("…"))), messages) is not None


def test_each_message_is_on_the_page():
    entries = page_messages()
    assert len(entries) > 200
    missing = [
        f"{file}: {message}"
        for message, file in source_messages().items()
        if message not in INTERNAL
        and not any(longest_part(message) in entry and matches(entry, message) for entry in entries)
    ]
    assert not missing, "\n".join([f"Add to a table of {PAGE.relative_to(ROOT)}, with what to do:", *missing])


def test_each_entry_is_in_the_source():
    known = source_messages().keys() | source_texts()
    stale = [entry for entry in page_messages() if not matches(entry, "\n".join(known))]
    assert not stale, "\n".join([f"Remove from {PAGE.relative_to(ROOT)}, or correct:", *stale])
    assert not [message for message in INTERNAL if message not in known]
