"""griffe extension: docstrings are plain prose, in which `[B, F]` is a shape and no Markdown link."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

CODE = re.compile(r"(`[^`\n]+`|^ {4}.*$)", re.MULTILINE)  # spans of code, and indented lines


class PlainDocstrings(Extension):
    """Escapes what Markdown would take for a link, emphasis or a tag, outside code."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            parts = CODE.split(obj.docstring.value)
            parts[::2] = [re.sub(r"([\[\]<>*_|])", r"\\\1", part) for part in parts[::2]]
            obj.docstring.value = "".join(parts)
