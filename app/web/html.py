"""HTML as nested calls. Text is escaped unless it is already `Html`, so that a job's name is never markup."""

from __future__ import annotations

import html as _html

VOID = frozenset({"link", "meta", "br", "input"})


class Html(str):
    """Markup that is safe to send as it is."""

    __slots__ = ()


def element(tag: str, *children: object, **attributes: object) -> Html:
    """`<tag attributes>children</tag>`; what is None is left out, `class_` is written `class`, `a_b` is `a-b`."""
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{_html.escape(str(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    if tag in VOID:
        return Html(f"<{tag}{written}>")
    return Html(f"<{tag}{written}>{join(children)}</{tag}>")


def join(children: object) -> Html:
    """The children one after the other, each escaped unless it is Html; lists are joined too."""
    if children is None:
        return Html("")
    if isinstance(children, Html):
        return children
    if isinstance(children, list | tuple):
        return Html("".join(join(child) for child in children))
    return Html(_html.escape(str(children)))
