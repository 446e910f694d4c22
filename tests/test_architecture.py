"""The dependency direction enhancer -> vlm_hooks -> vdm_priors, and who may know which library."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_import_contracts():
    done = subprocess.run([str(Path(sys.executable).parent / "lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_every_dependency_is_used():
    """No package is asked for that nothing imports, but those that a library asks for by itself."""
    named = {"opencv-python-headless": "cv2", "scikit-image": "skimage"}
    behind = {"accelerate": "transformers' Trainer", "sentencepiece": "T5's tokenizer", "tokenizers": "fast tokenizers",
              "torchvision": "Qwen2.5-VL's video processor"}
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    sources = "\n".join(path.read_text(encoding="utf-8") for name in ("enhancer", "vlm_hooks", "vdm_priors")
                        for path in (ROOT / name).rglob("*.py"))
    for package in (re.split(r"[<>=!~ ;\[]", text)[0] for text in declared):
        module = named.get(package, package)
        imported = re.search(rf"^\s*(import|from) {module}\b", sources, re.M)
        assert package in behind or imported, f"{package} is never imported"


def test_no_pickle_eval_or_remote_code():
    """Security: what would run code from a data or model file is not in the sources."""
    banned = ("import pickle", "torch.load(", "allow_pickle=True", "trust_remote_code=True", "eval(", "yaml.load(")
    sources = [p for name in ("enhancer", "vlm_hooks", "vdm_priors") for p in (ROOT / name).rglob("*.py")]
    assert len(sources) > 30
    found = [(path.name, word) for path in sources for word in banned
             for line in path.read_text(encoding="utf-8").splitlines()
             if re.search(rf"(?<![\w.]){re.escape(word)}", line) and not line.lstrip().startswith("#")]
    assert not found, found
