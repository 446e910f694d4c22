"""`write_page`: views in, one self-contained HTML page out, which asks nothing of any network.

Nothing of a clip becomes markup: all of it lies in JSON and base64 that the page's script reads, and the script
writes text as text. A Content-Security-Policy lets only this script and this style sheet run, and no address be loaded.
"""

from __future__ import annotations

import base64
import hashlib
import json
from importlib import resources
from pathlib import Path

import numpy as np
from matplotlib import colormaps

from enhancer.runfolder import write_text
from enhancer.visualize.encode import Blobs, encode
from enhancer.visualize.views import ClipView

SCRIPTS = ("base", "pictures", "charts", "tokens", "maps", "heads", "head_panel", "inversion", "codec", "main")
COLOURS = ("viridis", "cividis", "magma", "inferno")  # perceptually uniform; readable with any colour vision


def write_page(views: list[ClipView], path: Path, title: str, note: str = "", word: str | None = None) -> Path:
    """Writes the page whole or not at all. Raises UserError where it cannot be written."""
    write_text(path, page(views, title, note, word))
    return path


def page(views: list[ClipView], title: str, note: str = "", word: str | None = None) -> str:
    """The page's text. word: the one chosen at first, where a clip has it."""
    blobs = Blobs()
    data = encode(views, blobs) | {"title": title, "note": note, "word": word, "colours": _colours(blobs)}
    style = _static("page.css")
    script = "\n".join(["(() => {", '"use strict";', *(_static(f"{name}.js") for name in SCRIPTS), "})();"])
    parts = "\n".join(f'<script type="text/plain" id="blob{n}">{part}</script>' for n, part in enumerate(blobs.parts))
    fields = {
        "policy": f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'",
        "style": style,
        "data": as_json(data),
        "script": script,
        "blobs": parts,
    }
    return _filled(_static("page.html"), fields)


def as_json(data: object) -> str:
    """JSON that cannot end the element it stands in, whatever texts it holds."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _filled(template: str, fields: dict[str, str]) -> str:
    """Each {{ name }} of the template, once; what is filled in is not looked at again."""
    head, *rest = template.split("{{ ")
    for piece in rest:
        name, _, after = piece.partition(" }}")
        head += fields[name] + after
    return head


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}'"


def _colours(blobs: Blobs) -> dict[str, int]:
    """Tables of 256 colours, bytes [256, 3]."""
    places = np.linspace(0, 1, 256)
    return {name: blobs.add((255 * colormaps[name](places)[:, :3]).round().astype(np.uint8)) for name in COLOURS}


def _static(name: str) -> str:
    return resources.files("enhancer.visualize").joinpath("static", name).read_text(encoding="utf-8").strip()
