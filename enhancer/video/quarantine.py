"""The list of videos that hung or crashed the decoder: one JSON object a line, for people and all processes of a run.

A line is {"file", "reason", "when", "bytes", "modified"}. A file whose size or time has changed since is no longer
meant, and a line that somebody deletes is forgotten, so that the file is tried again.
"""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from enhancer.video.footage import Footage, Video, files_of
from vdm_priors.errors import UserError

QUARANTINE = "quarantine.jsonl"  # in the run folder


class Quarantine:
    """path None keeps the list in memory alone."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._stamp: tuple[int, int] | None = None
        self._reasons: dict[tuple, str] = {}

    def reason(self, video: Video) -> str | None:
        """Why this video is on the list, as the file says now; None if it is not. UserError for an unreadable list."""
        self._look()
        return self._reasons.get(_key(_described(video))) if self._reasons else None

    def add(self, video: Video, reason: str) -> None:
        """Puts it on the list. UserError if that cannot be written."""
        row = _described(video)
        self._reasons[_key(row)] = reason
        if self.path is None:
            return
        row = {"file": row["file"], "reason": reason, "when": datetime.now(UTC).isoformat(timespec="seconds"), **row}
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        try:
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(file, line)  # whole, beside what other processes append
            finally:
                os.close(file)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}). Free some space, or choose another "
                            f"`output`.") from error

    def _look(self) -> None:
        if self.path is None:
            return
        try:
            status = self.path.stat()
            stamp = status.st_size, status.st_mtime_ns
            if stamp == self._stamp:
                return
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            self._stamp, self._reasons = None, {}
            return
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self.path}: the quarantine list cannot be read ({error}). Mend or delete it.") from error
        reasons = {}
        for number, line in enumerate(text.removesuffix("\n").split("\n") if text else [], 1):  # names may hold U+2028
            try:
                row = json.loads(line)
                reasons[_key(row)] = str(row["reason"])
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise UserError(
                    f"{self.path}: line {number} is no entry of a quarantine list. Mend or delete it."
                ) from error
        self._stamp, self._reasons = stamp, reasons


def _described(video: Video) -> dict[str, Any]:
    """What tells a video from others, and from itself once it was mended. A bad file is bad in all its spans."""
    stamps = [file.stat() for file in files_of(video)]
    pictures = isinstance(video, Footage) and video.fps is not None
    return {"file": str(video if pictures else files_of(video)[0]), "bytes": sum(s.st_size for s in stamps),
            "modified": max(s.st_mtime_ns for s in stamps)}


def _key(row: dict[str, Any]) -> tuple:
    return row["file"], row["bytes"], row["modified"]
