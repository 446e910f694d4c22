"""Reads the files named on the command line: one line each, `ok`, `refused` (ClipError), or the name of another error.

Run by the tests as a process of its own, so that a crash of a decoder is seen as one.
"""

from __future__ import annotations

import sys
import time

import numpy as np

from enhancer.video.codec import Validity, read_motion
from vdm_priors.errors import ClipError


def verdict(path: str, references: str) -> str:
    try:
        field = read_motion(path, references=references, workers=1)
    except ClipError as error:
        return "refused" if path in str(error) else "refused without its name"
    if not np.array_equal(np.isnan(field.displacement[..., 0]), field.validity != Validity.INTER):
        return "numbers where the mask says none"
    if not np.isfinite(field.displacement[field.valid]).all() or not (np.diff(field.times) > 0).all():
        return "impossible numbers"
    return "ok"


if __name__ == "__main__":
    for n, name in enumerate(sys.argv[1:]):
        began = time.monotonic()
        try:
            found = verdict(name, ("match", "assume")[n % 2])
        except Exception as error:  # whatever else it is, it is the finding
            found = f"{type(error).__name__}: {error}"
        print(f"{time.monotonic() - began:.2f} {found}", flush=True)
