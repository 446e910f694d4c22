"""Writes a world: labelled H.264 clips with captions, questions and scene specifications.

<folder>/videos/*.mp4, <split>.json (conversations with options), <split>_static.json (captions of places and static
questions), video_info.meta.jsonl (MotionBench form of the test split), scenes.jsonl, world.json (settings; written last).
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from functools import partial
from multiprocessing import get_context
from typing import Callable, Iterator

import av
import cv2
import numpy as np
from av.video.reformatter import VideoReformatter

from enhancer.world.render import render_clip
from enhancer.world.scene import Scene
from enhancer.world.sampling import SPLITS, draw_scene
from enhancer.world.text import TYPES, Question, caption, description, places, static_question
from vdm_priors.errors import UserError

VERSION = 4  # raise when the same settings would draw other clips or questions


@dataclass
class WorldSettings:
    """What `enhancer world make` writes. Sizes in pixels; `questions` are relative shares of the six types.

    MO asks which of several moves some way and has three things at least, whatever `most_things` says.
    """

    seed: int = field(default=0, metadata={"help": "seed of every draw; the same settings give the same files"})
    train_clips: int = field(default=600, metadata={"help": "clips of the training split", "min": 0})
    validation_clips: int = field(default=0, metadata={"help": "clips of the validation split", "min": 0})
    test_clips: int = field(default=240, metadata={"help": "clips of the test split: other objects, textures, backgrounds",
                                                   "min": 0})
    height: int = field(default=64, metadata={"help": "pixels, even", "min": 16})
    width: int = field(default=64, metadata={"help": "pixels, even", "min": 16})
    frames: int = field(default=17, metadata={"help": "frames a clip", "min": 2})
    fps: float = field(default=8.0, metadata={"help": "frames a second", "min": 0.1})
    least_things: int = field(default=2, metadata={"help": "fewest things in a clip", "min": 1, "max": 4})
    most_things: int = field(default=3, metadata={"help": "most things in a clip", "min": 1, "max": 4})
    questions: dict[str, float] = field(
        default_factory=lambda: {kind: 1.0 for kind in TYPES},
        metadata={"help": "relative share of each question type (MR LM CM MO AO RC)"})
    all_pairs: bool = field(default=False, metadata={
        "help": "true: every split has all colour-shape pairs, as a base model needs; false: each split has pairs of its own"})
    crf: int = field(default=16, metadata={"help": "x264 quality, lower is better and larger", "min": 0, "max": 51})

    def check(self) -> list[str]:
        """What cannot be drawn or encoded, one sentence a fault."""
        faults = [f"world.{name} is {value}: H.264's colours need an even number of pixels"
                  for name, value in (("height", self.height), ("width", self.width)) if value % 2]
        if self.least_things > self.most_things:
            faults.append(f"world.least_things ({self.least_things}) is more than world.most_things ({self.most_things})")
        return faults

    def digest(self) -> str:
        text = json.dumps([VERSION, asdict(self)], sort_keys=True, default=float)
        return hashlib.sha256(text.encode()).hexdigest()


def write_clip(path: Path, frames: np.ndarray, fps: float, crf: int = 16) -> None:
    """Encode uint8 [N, H, W, 3] as H.264 (yuv420p; sides must be even); the same frames give the same bytes.

    x264's macroblock tree is off: with it, one clip in some was seen to differ between runs (6 files of 100 encodings).
    """
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001),
                                      options={"crf": str(crf), "preset": "veryfast", "threads": "1",
                                               "x264-params": "mbtree=0"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        converter = VideoReformatter()  # one thread: the same bytes every time
        for image in frames:
            picture = converter.reformat(av.VideoFrame.from_ndarray(image, format="rgb24"), format="yuv420p", threads=1)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def type_schedule(settings: WorldSettings, count: int, rng: np.random.Generator) -> list[str]:
    """Question type of each clip: exact shares, shuffled."""
    unknown = sorted(set(settings.questions) - set(TYPES))
    if unknown:
        raise UserError(f"world.questions: unknown type {', '.join(unknown)}; known: {', '.join(TYPES)}.")
    total = sum(settings.questions.values())
    if total <= 0:
        raise UserError("world.questions: all shares are zero; give at least one type a positive share.")
    edges = np.round(np.cumsum(list(settings.questions.values())) / total * count).astype(int)
    kinds = [kind for kind, n in zip(settings.questions, np.diff(edges, prepend=0), strict=True) for _ in range(n)]
    return [kinds[i] for i in rng.permutation(count)]


def clip_record(settings: WorldSettings, split: str, index: int, kind: str) -> tuple[dict, Question, dict[str, tuple[str, str]]]:
    """Scene record (as in scenes.jsonl), its question, and its static ones by kind; a function of its arguments."""
    rng = np.random.default_rng([settings.seed, SPLITS.index(split), index])
    scene, question = draw_scene(rng, kind, split, size=(settings.height, settings.width), frames=settings.frames,
                                 fps=settings.fps, things=(settings.least_things, settings.most_things),
                                 all_pairs=settings.all_pairs)
    said, mentions = caption(rng, scene)
    static = {"places": places(rng, scene), "short": static_question(rng, scene), "description": description(scene)}
    as_rows = lambda found: [[m.start, m.end, m.thing, m.moving] for m in found]  # noqa: E731
    record = {"video": f"{split}-{index:05d}.mp4", "split": split, "caption": said, "scene": scene.to_dict(),
              "texts": {question.text: as_rows(question.mentions), said: as_rows(mentions)}}
    return record, question, static


def _draw(settings: WorldSettings, videos: Path, split: str, index: int, kind: str) -> tuple[dict, Question, dict[str, tuple[str, str]]]:
    """One clip: its file (kept if it is there) and its records."""
    record, question, static = clip_record(settings, split, index, kind)
    target = videos / record["video"]
    if not target.is_file():
        partial = target.with_suffix(".part.mp4")
        try:
            write_clip(partial, render_clip(Scene.from_dict(record["scene"])), settings.fps, settings.crf)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)  # of an interrupted or failed encoding
    return record, question, static


def make_world(folder: Path | str, settings: WorldSettings, progress: Callable[[int, int, str], None] | None = None,
               workers: int = 1) -> None:
    """Make the world, or do nothing if it is there. Raises UserError if another world is in the folder.

    `workers` processes draw and encode; the files do not depend on their number.

    Interrupted runs continue: a clip is encoded under a temporary name and renamed, and existing clips are kept.
    """
    folder = Path(folder)
    faults = settings.check()
    if faults:
        raise UserError("; ".join(faults) + ".")
    if finished(folder, settings):
        return
    videos = folder / "videos"
    videos.mkdir(parents=True, exist_ok=True)
    claim = folder / "settings.sha256"
    if claim.is_file() and claim.read_text() != settings.digest():
        raise UserError(f"{folder}: holds a world made with other settings; choose another folder or delete this one.")
    claim.write_text(settings.digest())
    counts = {"train": settings.train_clips, "validation": settings.validation_clips, "test": settings.test_clips}
    total, done = sum(counts.values()), 0
    scenes = []
    for split in SPLITS:
        rows, static_rows, bench = [], [], []
        kinds = type_schedule(settings, counts[split], np.random.default_rng([settings.seed, 77, SPLITS.index(split)]))
        drawn = _drawn(settings, videos, split, kinds, workers)
        for record, question, static in drawn:
            scenes.append(record)
            rows.append(_conversation(record, question))
            static_rows += [{**_turns(record, f"{record['video'][:-4]}-{kind}", *asked), "question_type": kind}
                            for kind, asked in static.items()]
            bench.append(_motionbench(record, question, settings))
            done += 1
            if progress:
                progress(done, total, f"{split} clips")
        _write_json(folder / f"{split}.json", rows)
        _write_json(folder / f"{split}_static.json", static_rows)
        if split == "test":
            _write_lines(folder / "video_info.meta.jsonl", bench)
    _write_lines(folder / "scenes.jsonl", scenes)
    _write_json(folder / "world.json", {"digest": settings.digest(), "settings": asdict(settings)})


def finished(folder: Path, settings: WorldSettings) -> bool:
    """True if the folder holds this very world, complete."""
    path = Path(folder) / "world.json"
    return path.is_file() and json.loads(path.read_text(encoding="utf-8")).get("digest") == settings.digest()


def _drawn(settings: WorldSettings, videos: Path, split: str, kinds: list[str], workers: int) -> Iterator:
    """`_draw` of every clip, in order, by this process or by several."""
    todo = partial(_draw, settings, videos, split)
    if workers <= 1 or len(kinds) < 64:
        yield from map(todo, range(len(kinds)), kinds)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=cv2.setNumThreads, initargs=(1,)) as pool:
        yield from pool.map(todo, range(len(kinds)), kinds, chunksize=16)


def _turns(record: dict, sample_id: str, question: str, answer: str) -> dict:
    return {"id": sample_id, "video": f"videos/{record['video']}",
            "conversations": [{"from": "human", "value": f"<video>\n{question}"}, {"from": "gpt", "value": answer}]}


def _conversation(record: dict, question: Question) -> dict:
    row = _turns(record, record["video"][:-4], question.text, question.answer)
    return {**row, "options": list(question.options), "question_type": question.type, "caption": record["caption"]}


def _motionbench(record: dict, question: Question, settings: WorldSettings) -> dict:
    letters = "ABCD"
    listed = "\n".join(f"{letters[i]}. {option}" for i, option in enumerate(question.options))
    qa = {"uid": record["video"][:-4], "question": f"{question.text}\n{listed}",
          "answer": letters[question.options.index(question.answer)]}
    return {"question_type": question.type, "video_type": "world", "key": record["video"][:-4],
            "video_path": record["video"], "qa": [qa],
            "video_info": {"duration": settings.frames / settings.fps, "fps": settings.fps}}


def _write_json(path: Path, data) -> None:
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(json.dumps(data, indent=1, ensure_ascii=False), encoding="utf-8")
    part.replace(path)


def _write_lines(path: Path, rows: list[dict]) -> None:
    part = path.with_suffix(path.suffix + ".part")
    part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    part.replace(path)
