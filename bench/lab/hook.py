"""Puts our lines into fs/userfaultfd.c, found by anchors.

A patch file would carry lines of the kernel as context, and would apply with
fuzz to a source it does not fit. An anchor names one function and one line in
it; anything but exactly one match is an error that says which.
"""

from __future__ import annotations

import dataclasses
import re


class AnchorError(Exception):
    """The kernel source is not the one the hook was written for."""


@dataclasses.dataclass(frozen=True)
class Hook:
    """Lines to put before or after one line of one function.

    Without a line, the function's own definition is the anchor.
    """

    function: str
    lines: tuple[str, ...]
    anchor: str = ""
    where: str = "before"


HOOKS = (
    Hook("userfaultfd_read", ('#include "uffd_rfc.c"', "")),
    Hook(
        "userfaultfd_read",
        (
            "\tif (ctx->features & UFFD_RFC_FORMATS)",
            "\t\treturn uffd_rfc_read(ctx, buf, count, no_wait, inode);",
            "",
        ),
        anchor="for (;;) {",
    ),
    Hook(
        "userfaultfd_api",
        (
            "\tif (uffd_rfc_api(ctx, buf, uffdio_api.api, &ret))",
            "\t\tgoto out;",
        ),
        anchor="features = uffdio_api.features;",
        where="after",
    ),
)


def body_of(source: list[str], function: str) -> range:
    """The line numbers of a function, from its definition to its closing brace."""
    head = re.compile(rf"^[a-z].*\b{re.escape(function)}\(")
    heads = []
    for number, line in enumerate(source):
        if head.match(line):
            rest = enumerate(source[number:], number)
            # A prototype meets its ";" first, a definition its "{".
            opening = next((n for n, text in rest if text == "{" or text.endswith(";")), None)
            end = next((n for n, text in rest if text == "}"), None)
            if opening is not None and source[opening] == "{" and end is not None:
                heads.append(range(number, end + 1))
    if len(heads) != 1:
        raise AnchorError(f"fs/userfaultfd.c defines {function}() {len(heads)} times, expected once")
    return heads[0]


def apply(text: str, hooks: tuple[Hook, ...] = HOOKS) -> str:
    """The text of fs/userfaultfd.c with every hook in place."""
    source = text.splitlines()
    if any("uffd_rfc" in line for line in source):
        raise AnchorError("fs/userfaultfd.c is hooked already")
    for hook in hooks:
        body = body_of(source, hook.function)
        at = [body.start]
        if hook.anchor:
            at = [n for n in body if source[n].strip() == hook.anchor]
        if len(at) != 1:
            raise AnchorError(
                f"anchor {hook.anchor!r} found {len(at)} times in {hook.function}(), expected once"
            )
        place = at[0] + (1 if hook.where == "after" else 0)
        source[place:place] = hook.lines
    return "\n".join(source) + "\n"
