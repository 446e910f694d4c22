"""What a sample shows: a whole video file (a Path), or Footage: a span of one, or pictures in their order.

Both are values that can be compared and used as keys; times count from the file's first frame in every case.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from vdm_priors.errors import ClipError

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
PICTURES_A_SECOND = 2.0  # where a list of pictures does not say; what Qwen's tools assume


@dataclass(frozen=True)
class Footage:
    """One video file or, where fps is given, pictures shown at that rate; of it the seconds from start to end.

    end None is the end of the file or of the pictures; assumed: that nobody said the pictures' fps.
    """

    files: tuple[Path, ...]
    start: float = 0.0
    end: float | None = None
    fps: float | None = None
    assumed: bool = field(default=False, compare=False)

    @property
    def name(self) -> str:
        """The (first) file's name."""
        return self.files[0].name

    def __str__(self) -> str:
        more = f" and {len(self.files) - 1} more pictures" if len(self.files) > 1 else ""
        rate = "" if self.fps is None else f" at {self.fps:g} a second"
        span = f" from {self.start:g} s" if self.start or self.end is not None else ""
        return f"{self.files[0]}{more}{rate}{span}" + ("" if self.end is None else f" to {self.end:g} s")


Video = Path | Footage


def files_of(video: Video) -> tuple[Path, ...]:
    """The files that it is read from."""
    return video.files if isinstance(video, Footage) else (Path(video),)


def video_digest(video: Video) -> str:
    """Hash of all that is shown: a whole file's is vdm_priors.store.file_digest, so that its priors stay valid.

    Raises StoreError if a file cannot be read.
    """
    from vdm_priors.store import content_key, file_digest  # needs torch, and a decoder's process does not

    if not isinstance(video, Footage):
        return file_digest(video)
    files = [file_digest(file) for file in video.files]
    return content_key(files=files, start=video.start, end=video.end, fps=video.fps)


def coded_span(video: Video, start: float, end: float | None) -> tuple[Path, float, float | None]:
    """The video file, and the seconds of it that a sampling's `start` to `end` are: they count within its span.

    Raises ClipError for pictures, which no video codec wrote.
    """
    if not isinstance(video, Footage):
        return Path(video), start, end
    if video.fps is not None:
        raise ClipError(
            f"{video}: pictures hold no codec's motion. Take another source's priors, or give a video file."
        )
    return video.files[0], *within(video, start, end)


def within(footage: Footage, start: float, end: float | None) -> tuple[float, float | None]:
    """`start` and `end` seconds of the footage's span as seconds of its file."""
    ends = [] if end is None else [footage.start + end]
    ends += [] if footage.end is None else [footage.end]
    return footage.start + start, min(ends, default=None)
