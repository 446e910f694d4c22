"""Motion read in another process: the same fields, and files that hang or crash it are put aside."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from enhancer.data.samples import Problem, Sample
from enhancer.sources import SourceContext, build_source
from enhancer.video.clip import Sampling
from enhancer.video.codec import energy_map, read_motion
from enhancer.video.codec.guarded import QUARANTINE, GuardedMotion, motion_reader, read_with_energy
from enhancer.video.quarantine import Quarantine
from tests.video.clips import panned, write
from vdm_priors.errors import ClipError, UserError
from vdm_priors.store import PriorStore

BAD = (sys.executable, str(Path(__file__).with_name("bad_motion.py")))
SECONDS = 8.0  # enough on a busy machine; what hangs does so for ten minutes


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write(tmp_path_factory.mktemp("guarded") / "clip.mp4", panned(9, (1.5, -0.75)), rotation=90)


@pytest.fixture(scope="module")
def reader():
    return motion_reader(600.0)


@pytest.mark.parametrize("how", [{}, {"qp": True, "references": "assume"}, {"fallback": "none"}])
def test_fields_are_those_of_read_motion(video, reader, how):
    (field, energy), expected = reader(video, 0.08, 0.3, **how), read_motion(video, 0.08, 0.3, **how)
    assert energy is None and field.tobytes() == expected.tobytes()
    for name in ("path", "duration", "provenance", "notes"):
        assert getattr(field, name) == getattr(expected, name), name
    assert (field.qp is None) == (expected.qp is None) and field.grid().shape == expected.grid().shape


def test_energy_and_errors_come_along(video, reader, tmp_path):
    field, energy = reader(video, energy=True)
    assert np.array_equal(energy, energy_map(field), equal_nan=True)
    (tmp_path / "text.mp4").write_text("no video")
    for path, how, error in [(tmp_path / "text.mp4", {}, ClipError), (tmp_path / "none.mp4", {}, ClipError),
                             (video, {"start": 9.0}, ClipError), (video, {"references": "guess"}, UserError)]:
        with pytest.raises(error) as expected:
            read_motion(path, **how)
        with pytest.raises(error) as got:
            reader(path, **how)
        assert str(got.value) == str(expected.value) and type(got.value) is error
    assert motion_reader(None) is read_with_energy


def test_bad_files_are_put_aside_and_the_others_go_on(video, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    files = {name: Path(shutil.copy(video, tmp_path / f"{name}.mp4")) for name in ("good", "segfault", "hang")}
    motion = GuardedMotion(SECONDS, Quarantine(tmp_path / QUARANTINE), BAD)
    motion.start()
    context = SourceContext(samples=[], store=PriorStore(tmp_path / "store"), sampling=Sampling(4), motion=motion)
    samples = [Sample(name, file, "Where does it roll?", "left") for name, file in files.items()]
    for source in ("codec", "residual"):
        found = {sample.id: prior for sample, prior in build_source(source, context).extract(samples)}
        assert not isinstance(found["good"], Problem)
        assert "reading its motion ended the decoder's process (SIGSEGV)" in found["segfault"].reason
        assert f"reading its motion took longer than data.timeout, {SECONDS:g} s" in found["hang"].reason
    listed = [json.loads(line)["file"] for line in (tmp_path / QUARANTINE).read_text().splitlines()]
    # once each: the second source did not try them again
    assert listed == [str(files["segfault"]), str(files["hang"])]
