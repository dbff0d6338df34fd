"""Signatures that read well, and names in the text that lead to them."""

import re
from typing import Any

from docutils import nodes
from public import MODULES, names_of
from sphinx.addnodes import desc_signature, pending_xref
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util.typing import stringify_annotation

from modaldummy._core.parameter_map import ModalityKey, ModalityParamMap, ParamSpec

# What Python makes of a type alias, and its name; the longest first, as one is part of another.
ALIASES = {
    stringify_annotation(alias, "smart"): name
    for alias, name in (
        (ModalityParamMap, "ModalityParamMap"),
        (ParamSpec, "ParamSpec"),
        (ModalityKey, "ModalityKey"),
    )
}
NAMES = {
    name: f"{module}.{name}"
    for module in MODULES
    for name in names_of(module)
    # `batches` and `scales` are words of the text, too, and `active_modalities` is a key.
    if name not in ("active_modalities", "active_sets", "batches", "param_maps", "scales")
}


def shorten(text: str | None) -> str | None:
    """Types under their short names."""
    if text is None:
        return None
    for long, name in ALIASES.items():
        text = text.replace(long, name)
    # Sphinx writes a list around the dots.
    return text.replace("Callable[[...], ", "Callable[..., ")


def process_signature(*event: Any) -> tuple[str | None, str | None]:
    """Shorten arguments and what is returned."""
    *_, arguments, returned = event
    return shorten(arguments), shorten(returned)


def process_docstring(*event: Any) -> None:
    """Move the type of an attribute up, to its name."""
    lines = event[-1]
    types = [i for i, line in enumerate(lines) if re.fullmatch(r"\s+:type: .+", line)]
    for i in types:
        start = max(j for j in range(i) if lines[j].lstrip().startswith(".. attribute::"))
        # Without the module: `Mapping`, not `collections.abc.Mapping`.
        lines.insert(start + 1, re.sub(r"(?<![\w.])(?:\w+\.)+(?=[A-Z])", r"~\g<0>", lines.pop(i)))


class Links(SphinxTransform):
    """The first time that a page has the name of something public in code, it is a link."""

    default_priority = 500

    def apply(self, **_: Any) -> None:
        """Make the links."""
        seen = set()
        for node in list(self.document.findall(nodes.literal)):
            name = node.astext()
            if name not in NAMES or name in seen or is_link_or_heading(node):
                continue
            seen.add(name)
            link = pending_xref(
                "", refdomain="py", reftype="obj", reftarget=NAMES[name], refexplicit=True
            )
            link["refdoc"] = self.env.docname
            node.replace_self(link)
            link += node


def is_link_or_heading(node: nodes.Node) -> bool:
    """Whether a link would be in the way."""
    parents = (nodes.reference, nodes.title, pending_xref, desc_signature)
    while node.parent is not None:
        node = node.parent
        if isinstance(node, parents):
            return True
    return False


def setup(app: Sphinx) -> dict[str, bool]:
    """Listen to autodoc, after napoleon."""
    app.connect("autodoc-process-signature", process_signature)
    app.connect("autodoc-process-docstring", process_docstring, priority=900)
    app.add_transform(Links)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
