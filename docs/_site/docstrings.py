"""Extension of griffe: docstrings in TRL's format as Markdown, since `Args:` and its kin are no Markdown."""

import inspect
import re

import griffe

SECTION = re.compile(r"^(Args|Parameters|Attributes|Returns|Yields|Raises|Examples?):\s*$")
ITEM = re.compile(r"^ {4}(?! )(?:(\*{0,2}\w+(?:, \w+)*)( \(.+\))?|(`.+`|\[`.+`\](?: .+?)?)):(?:\s+(.*))?$")
REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\](?![\[(])")


class TrlDocstrings(griffe.Extension):
    """Rewrites the docstring of every object once, when griffe has made the object."""

    def on_object(self, *, obj, **kwargs):
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(docstring):
    """
    The Markdown of a docstring in TRL's format.

    Args:
        docstring (`str`):
            Paragraphs, then sections whose items are `name (`type`):` with an indented description.
    """
    lines, in_section = [], False
    for line in inspect.cleandoc(docstring).splitlines():
        if header := SECTION.match(line):
            in_section = not header[1].startswith("Example")
            lines += ["", f"**{header[1]}**", ""]
        elif in_section and (item := ITEM.match(line)):
            name, kind, bare, rest = item.groups()
            head = f"`{name}`{kind or ''}" if name else bare
            lines.append(f"* {head}: {rest or ''}".rstrip())
        elif in_section and line.startswith("    "):
            lines.append(line[4:])  # of an item, or a paragraph instead of items
        else:
            in_section = in_section and not line.strip()
            lines.append(line)
    return REFERENCE.sub(_code, "\n".join(lines))


def _code(reference):
    tilde, name = reference.groups()
    return f"`{name.rsplit('.', 1)[-1] if tilde else name}`"
