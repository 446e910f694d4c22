"""Streams of unusual kinds: periodic intra refresh, fades with weighted prediction, encryption."""

from __future__ import annotations

import av
import numpy as np
import pytest

from enhancer.video.clip import Sampling, read_clip
from enhancer.video.codec import accumulate, read_motion
from enhancer.video.codec.h264 import Headers
from enhancer.video.codec.pictures import key_frames, pictures_of
from enhancer.video.codec.streams import index_stream, picture_packets
from tests.video.clips import middle, panned, write
from vdm_priors.errors import ClipError

MOTION = (1.5, -0.75)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("streams")


@pytest.mark.parametrize("codec, name, params", [
    ("libx264", "a.mp4", "intra-refresh=1:keyint=8"), ("libx264", "a.ts", "intra-refresh=1:keyint=8:bframes=0"),
    ("libx265", "b.mp4", "log-level=none:frame-threads=1:pools=none:intra-refresh=1:keyint=8:bframes=0")])
def test_periodic_intra_refresh_loses_no_frame(folder, codec, name, params):
    """Its key frames are P-frames, at which a decoder gives nothing for a whole period."""
    pictures = panned(20, MOTION)
    video = write(folder / name, pictures, codec, {f"{codec[3:]}-params": params, "crf": "18"})
    index, field = index_stream(video), read_motion(video, workers=3)
    assert "-" not in field.kinds and field.kinds.tolist().count("I") == 1 and field.notes == []
    assert field.tobytes() == read_motion(video, workers=1).tobytes()
    assert field.valid[1:].mean() > 0.7
    for frame in range(1, 20):
        if field.valid[frame].mean() > 0.5:
            assert middle(field, frame) == pytest.approx(MOTION, abs=0.3), frame
    if codec == "libx264":
        assert index.keys.sum() == 3 and len(index.segments) == 1
        assert [time for time, _ in key_frames(video)] == pytest.approx([0.0])
    assert accumulate(field, 4, reset=()).span[-1] == 4


def test_a_decoder_can_begin_with_the_i_frames_of_other_streams(folder):
    """What the headers say, against the decoder's frame types."""
    options = {"preset": "medium", "g": "7", "x264-params": "open-gop=1:scenecut=0:slices=2"}
    for name in ("c.mp4", "c.ts"):
        video = write(folder / name, panned(20, MOTION), options=options)
        with av.open(str(video)) as container:
            stream = container.streams.video[0]
            headers = Headers(stream.codec_context.extradata)
            told = [headers.is_intra(bytes(packet)) for _, packet in picture_packets(container, stream)]
        with av.open(str(video)) as container:
            intra = [int(frame.pict_type) == 1 for frame in container.decode(video=0)]
        assert sum(told) == sum(intra) == 3 and told[0] and not told[1] and len(told) == 20
        assert read_motion(video, workers=1).tobytes() == read_motion(video, workers=3).tobytes()


@pytest.mark.parametrize("b_frames", ["0", "3"])
def test_fades_with_weighted_prediction(folder, b_frames):
    """B-frames are left out: in a fade the encoder chooses vectors that are not the motion."""
    light = np.linspace(1, 0.3, 13)[:, None, None, None]
    options = {"preset": "medium", "bf": b_frames, "crf": "16", "x264-params": "weightp=2:weightb=1"}
    pictures = (panned(13, MOTION) * light).astype(np.uint8)
    field = read_motion(write(folder / f"fade{b_frames}.mp4", pictures, options=options))
    predicted = field.kinds == "P"
    off = np.hypot(*np.moveaxis(field.displacement[predicted] - np.array(MOTION), -1, 0))[field.valid[predicted]]
    assert field.valid[1:].mean() > 0.8 and (off < 0.5).mean() > 0.95
    # without the change of light, 0.52: the right candidate is as unlike as the others
    assert np.nanmean(field.confidence[predicted]) > 0.7


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_an_encrypted_file_is_refused_by_name(folder, codec):
    """MPEG Common Encryption as FFmpeg's own muxer writes it."""
    keys = {"encryption_scheme": "cenc-aes-ctr", "encryption_key": "76a6c65c5ea762046bd749a2e632ccbb",
            "encryption_kid": "a7e61c373e219033c21091fa607bf3b8"}
    video = write(folder / f"{codec}_locked.mp4", panned(8, MOTION), codec, container_options=keys)
    assert b"encv" in video.read_bytes()
    for read in (read_motion, lambda path: read_clip(path, Sampling(2)), lambda path: list(key_frames(path))):
        with pytest.raises(ClipError, match=f"{codec}_locked.mp4: its video is encrypted"):
            read(video)
    assert len(list(pictures_of(read_motion(write(folder / "open.mp4", panned(8, MOTION), codec))))) == 8
