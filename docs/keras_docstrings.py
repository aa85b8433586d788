"""Makes Keras docstrings readable for griffe's Google style.

Keras writes `Formula:`, `Example:` and `References:` as lines of their own,
followed by text that is not indented, and leaves examples as bare doctests.
Markdown would make paragraphs and nested quotations of them.
"""

import re

import griffe

# Sections whose text is not indented.
_TITLE = re.compile(r"^(Formulas?|Examples?|References):$", re.MULTILINE)
# Sections of arguments that griffe does not know by these names.
_ARGUMENTS = {"Call arguments:": "Other Args: Call arguments:"}
_PROSE = re.compile(r"^(Input shape|Output shape):\n((?:    .*\n?|\n)+)", re.M)
# A doctest, up to the next blank line.
_DOCTEST = re.compile(r"^(>>> (?:.+\n?)+)", re.MULTILINE)


def to_google(text):
    """The text of a docstring with Markdown in the place of Keras's style."""
    for name, title in _ARGUMENTS.items():
        text = text.replace(name, title)
    text = _PROSE.sub(_without_indent, text)
    text = _TITLE.sub(lambda match: _heading(match[1]), text)
    return _DOCTEST.sub(
        lambda match: f"```pycon\n{match[1].rstrip()}\n```\n", text
    )


def _heading(title):
    return f'<span class="doc-section-title">{title}:</span>\n'


def _without_indent(match):
    body = re.sub("^    ", "", match[2], flags=re.MULTILINE)
    return f"{_heading(match[1])}\n{body}"


class KerasDocstrings(griffe.Extension):
    """Rewrites every docstring before griffe parses it."""

    def on_instance(self, *, obj, **kwargs):
        if obj.docstring:
            obj.docstring.value = to_google(obj.docstring.value)
