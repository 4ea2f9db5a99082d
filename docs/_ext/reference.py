"""The API reference: a table of names, what each does, and its docstring below.

The directive `reference` takes names, one in a line. Anywhere on the site, a public
name in a code font links to its entry.
"""

import inspect
import pkgutil
import re
from collections.abc import Iterator

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.domains.python import ObjectEntry
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode


def entry(name: str) -> Iterator[str]:
    """The lines of reStructuredText that print the docstring of a name."""
    found = pkgutil.resolve_name(name)
    if inspect.ismodule(found):
        yield f".. automodule:: {name}"
    elif inspect.isclass(found):
        kind = "exception" if issubclass(found, BaseException) else "class"
        yield f".. auto{kind}:: {name}"
        yield "   :members:"
    elif callable(found):
        yield f".. autofunction:: {name}"
    else:
        yield f".. autodata:: {name}"
    yield ""


class Reference(SphinxDirective):
    """A table of names and summaries, and an entry for each."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        """Parses what autosummary and autodoc make of the names."""
        names = [line.strip() for line in self.content if line.strip()]
        lines = [".. autosummary::", "   :nosignatures:", ""]
        lines += [f"   {name}" for name in names]
        lines.append("")
        for name in names:
            lines += entry(name)
        section = nodes.section()
        section.document = self.state.document
        self.state.nested_parse(
            StringList(lines, self.get_source_info()[0]), self.content_offset, section
        )
        return section.children


CODE = re.compile(r"(?<!`)`([^`]+)`(?!`)(?=(\w?))")


def markdown_code(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Reads `code` in docstrings as Markdown does, not as reStructuredText does."""

    def literal(found: re.Match[str]) -> str:
        # A letter may follow at once, as in the plural of a class.
        return f"``{found[1]}``" + ("\\ " if found[2] else "")

    lines[:] = CODE.sub(literal, "\n".join(lines)).split("\n")


class LinkNames(SphinxPostTransform):
    """Turns a public name in a code font into a link to its entry."""

    default_priority = 700

    def run(self, **kwargs: object) -> None:
        """Looks up every literal of a page that is not inside a link."""
        for literal in list(self.document.findall(nodes.literal)):
            name = literal.astext().removesuffix("()")
            target = self.find(name)
            if target is None:
                continue
            if any(isinstance(above, nodes.reference) for above in parents(literal)):
                continue
            link = make_refnode(
                self.app.builder,
                self.env.docname,
                target.docname,
                target.node_id,
                literal.deepcopy(),
                name,
            )
            literal.replace_self(link)

    def find(self, name: str) -> ObjectEntry | None:
        """The entry of a name, which docstrings give without its package."""
        objects = self.env.domains.python_domain.objects
        if name.startswith("jaxmp"):
            return objects.get(name)
        if not self.env.docname.startswith("reference/"):
            return None
        # `policy` is an argument more often than a package.
        found = objects.get(f"jaxmp.{name}")
        return None if found is None or found.objtype == "module" else found


def parents(node: nodes.Node) -> Iterator[nodes.Node]:
    """What a node lies in, from the inside out."""
    while (node := node.parent) is not None:
        yield node


def setup(app: Sphinx) -> dict[str, bool]:
    """Tells Sphinx of the directive and the transform."""
    app.setup_extension("sphinx.ext.autodoc")
    app.setup_extension("sphinx.ext.autosummary")
    app.add_directive("reference", Reference)
    app.add_post_transform(LinkNames)
    before_napoleon = 400
    app.connect("autodoc-process-docstring", markdown_code, before_napoleon)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
