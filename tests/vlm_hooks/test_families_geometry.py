"""Every visual token's cell, read off the real processor and the real model, for every family.

The pixels of a video say which clip, frame, row and column they are. The real processor prepares them, the real model
embeds them. With attention and MLP of the vision tower switched off, the embedding that enters the language model at a
position depends only on the pixels of its own token, and its gradient says on which: their codes are the token's cell.
TokenGrid must name that cell: span, row, column. Nothing of the model's or the processor's layout is written down here.
"""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import InternVLConfig, LlavaOnevisionConfig, Qwen2_5_VLConfig, Qwen2VLConfig, Qwen3VLConfig

from tests.vlm_hooks.tiny_families import SAVERS, family_student
from tests.vlm_hooks.tiny_student import Clip
from vdm_priors.errors import ModelError, SampleError

QWENS = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
SQUARE = {"internvl": 32, "internvl-3.5": 32, "llava_onevision": 44}
PATCH = 8
MIXING = re.compile(r"\.(attn\.proj|mlp\.(fc2|down_proj|linear_fc2)|self_attn\.out_proj|lambda_[12])\b")
BOX = (0.1, 0.2, 0.9, 0.8)


def coded_clip(number: int, frames: int, height: int, width: int, fps: float = 4.0) -> Clip:
    """Red says clip and frame, green the row, blue the column of every pixel."""
    pixels = np.zeros((frames, height, width, 3), np.uint8)
    pixels[..., 0] = (16 * number + 2 * np.arange(frames))[:, None, None]
    pixels[..., 1] = 2 * np.arange(height)[None, :, None]
    pixels[..., 2] = 2 * np.arange(width)[None, None, :]
    return Clip(pixels, [n / fps for n in range(frames)], frames / fps, box=BOX)


def without_mixing(name: str):
    """A student whose vision tower passes every patch on by itself."""
    student = family_student(name)
    found = [p for n, p in student.model.named_parameters() if student.VISION in n.split(".") and MIXING.search(n)]
    assert len(found) >= 4, "the names of the blocks' last layers have changed"
    for parameter in found:
        torch.nn.init.zeros_(parameter)
    return student


def pixels_seen(student, inputs) -> dict[tuple[int, int], torch.Tensor]:
    """(sample, position) -> colours [n, 3] (0 to 255) of the pixels on which the embedding there depends."""
    inputs = dict(inputs)
    key = "pixel_values_videos" if "pixel_values_videos" in inputs else "pixel_values"
    inputs[key] = inputs[key].clone().requires_grad_()
    embeds = []
    hook = student.model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: embeds.append(kwargs["inputs_embeds"]), with_kwargs=True)
    student.model(**inputs)
    hook.remove()
    processor = student.processor.video_processor
    colours = colours_last(inputs[key].detach(), processor) * torch.tensor(processor.image_std)
    colours = 255 * (colours + torch.tensor(processor.image_mean))
    torch.manual_seed(1)
    values = embeds[0] @ torch.randn(embeds[0].shape[-1])  # [B, S]
    video = torch.isin(inputs["input_ids"], student._visual_ids())
    # one gradient for each visual position, and one for all others together
    single = torch.nn.functional.one_hot(video.flatten().nonzero()[:, 0], video.numel())
    masks = torch.cat([single, ~video.reshape(1, -1)])
    (gradients,) = torch.autograd.grad(values.flatten(), inputs[key], masks.to(values), is_grads_batched=True)
    supports = colours_last(gradients, processor).abs().sum(dim=-1) > 0
    assert not supports[-1].any(), "a text position depends on pixels"
    places = [(b, s) for b, s in video.nonzero().tolist()]
    return {place: colours[support] for place, support in zip(places, supports[:-1], strict=True) if support.any()}


def colours_last(pixels: torch.Tensor, processor) -> torch.Tensor:
    """The processor's pixels, flat patches or frames, as [..., 3]."""
    if hasattr(processor, "temporal_patch_size"):
        return pixels.unflatten(-1, (3, processor.temporal_patch_size, PATCH, PATCH)).movedim(-4, -1)
    return pixels.movedim(-3, -1)


def check_cells(grid, positions, sample, number, clip, seen, slack=0.0):
    """AssertionError unless every token of the grid sees exactly the frames, rows and columns of its cell."""
    _, height, width, _ = clip.frames.shape
    top_of_box, left_of_box, bottom_of_box, right_of_box = clip.box
    for token, position in enumerate(positions.tolist()):
        (start, end), (top, left, bottom, right) = grid.cell(token)
        codes = seen[sample, position].round().int()
        frames = {n for n, time in enumerate(clip.times) if start <= time < end}
        assert {16 * number + 2 * n for n in frames} == set(codes[:, 0].tolist())
        for channel, low, high, first, size, length in (
            (1, top, bottom, top_of_box, height, bottom_of_box - top_of_box),
            (2, left, right, left_of_box, width, right_of_box - left_of_box),
        ):
            pixels = codes[:, channel] // 2
            assert abs(int(pixels.min()) - (low - first) / length * size) <= slack + 1e-6
            assert abs(int(pixels.max()) + 1 - (high - first) / length * size) <= slack + 1e-6


def slack_of(name: str) -> float:
    """LLaVA-OneVision's pooling reads whole patches, up to half of one beside a cell's border; cells have 1.67."""
    return PATCH / 2 if name == "llava_onevision" else 0.0


def encoded(student, clips, side="right"):
    prompts = [student.prompt("Where does it go?" if n else "It?").text for n in range(len(clips))]
    return student.encode(clips, prompts, padding_side=side).inputs


def sizes_of(name: str) -> list[tuple[int, int]]:
    return [(SQUARE[name],) * 2] if name in SQUARE else [(32, 48), (48, 32), (16, 64)]


@pytest.mark.parametrize(("name", "frames"), [(n, f) for n in SAVERS for f in (1, 2, 5)])
def test_an_index_encoded_video_points_back_to_the_grids_cells(name, frames):
    student = without_mixing(name)
    for height, width in sizes_of(name)[: 3 if frames == 2 else 1]:
        clip = coded_clip(1, frames, height, width)
        inputs = encoded(student, [clip])
        (grid,), (positions,) = student.grids(inputs, [clip])
        depth = student.frames_per_token()
        cells = {"llava_onevision": (3, 3)}.get(name, (height // 16, width // 16))
        assert grid.shape == (-(-frames // depth), *cells)
        seen = pixels_seen(student, inputs)
        assert set(seen) == {(0, position) for position in positions.tolist()}, "tokens with pixels but without a cell"
        check_cells(grid, positions, 0, 1, clip, seen, slack_of(name))


@pytest.mark.parametrize("name", list(SAVERS))
def test_a_wrong_order_or_place_is_found(name):
    """The check above fails for axes swapped, tokens shifted by one, times or sides exchanged."""
    student = without_mixing(name)
    clip = coded_clip(1, 4, *sizes_of(name)[0])
    inputs = encoded(student, [clip])
    (grid,), (positions,) = student.grids(inputs, [clip])
    seen = pixels_seen(student, inputs)
    check_cells(grid, positions, 0, 1, clip, seen, slack_of(name))
    cube = positions.reshape(grid.shape)
    wrong = [cube.transpose(1, 2), cube.permute(1, 2, 0), cube.flip(0), cube.flip(1), cube.flip(2), positions.roll(1),
             positions.roll(-1)]
    for order in wrong:
        with pytest.raises(AssertionError):
            check_cells(grid, order.flatten(), 0, 1, clip, seen, slack_of(name))
    beside = positions + 1
    with pytest.raises((AssertionError, KeyError)):
        check_cells(grid, beside, 0, 1, clip, seen, slack_of(name))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", list(SAVERS))
def test_cells_in_a_padded_batch_of_different_clips(name, side):
    student = without_mixing(name)
    sizes = sizes_of(name)
    clips = [coded_clip(n, frames, *sizes[n % len(sizes)]) for n, frames in enumerate((3, 2, 3))]
    if name == "llava_onevision":
        clips[1] = coded_clip(1, 3, *sizes[0])
    inputs = encoded(student, clips, side)
    grids, columns = student.grids(inputs, clips)
    seen = pixels_seen(student, inputs)
    assert set(seen) == {(b, p) for b, positions in enumerate(columns) for p in positions.tolist()}
    for b, clip in enumerate(clips):
        check_cells(grids[b], columns[b], b, b, clip, seen, slack_of(name))


@pytest.mark.parametrize("name", list(SAVERS))
def test_images_and_other_videos_beside_the_clip(name):
    student = without_mixing(name)
    processor = student.processor
    height, width = sizes_of(name)[0]
    clips = [coded_clip(n, 2, height, width) for n in range(3)]
    picture = np.full((height, width, 3), 250, np.uint8)
    image, video = processor.image_token, processor.video_token
    texts = [f"{image} one {video}{image}\n{video} the second?", f"Look: {video} here?"]
    settings = student.processor_settings(clips)
    inputs = dict(processor(text=texts, images=[picture, picture], padding=True, padding_side="left",
                            return_tensors="pt", **settings))
    asked = [clips[1], clips[2]]
    grids, columns = student.grids(inputs, asked, which=[1, 0])
    first, _ = student.grids(inputs, [clips[0], clips[2]], which=[0, 0])
    seen = pixels_seen(student, inputs)
    for sample, number in ((0, 1), (1, 2)):
        check_cells(grids[sample], columns[sample], sample, number, clips[number], seen, slack_of(name))
    assert first[0] == grids[0] and len(student.videos(inputs)[0]) == 2
    with pytest.raises(ModelError, match="Sample 0 .* 2 videos and none was chosen: say with `which`"):
        student.grids(inputs, asked)
    with pytest.raises(ModelError, match="1 videos and number 1 .counted from 0. was chosen"):
        student.grids(inputs, asked, which=[0, 1])


@pytest.mark.parametrize("name", list(SAVERS))
def test_cells_of_every_video_of_a_sample_with_a_picture_between_them(name):
    """As training encodes it: one prompt, two videos with a picture between them, beside a sample of one."""
    student = without_mixing(name)
    sizes = sizes_of(name)
    clips = [coded_clip(n, 2, *sizes[n % len(sizes)]) for n in range(3)]
    picture = np.full((*sizes[0], 3), 250, np.uint8)
    shown = [[clips[0], picture, clips[1]], clips[2]]
    prompts = [student.prompt("Which?", shown=["video", "image", "video"]).text, student.prompt("Where is it?").text]
    encoding = student.encode(shown, prompts, ["this", "there"], padding_side="left")
    inputs = {key: value for key, value in encoding.inputs.items() if key != "labels"}
    grids, columns = student.grids(inputs, shown)
    seen = pixels_seen(student, inputs)
    for video, (sample, number) in enumerate([(0, 0), (0, 1), (1, 2)]):
        check_cells(grids[video], columns[video], sample, number, clips[number], seen, slack_of(name))
    with pytest.raises(AssertionError):
        check_cells(grids[1], columns[0], 0, 1, clips[1], seen, slack_of(name))
    taught = encoding.inputs["labels"][0]
    text = student.tokenizer.decode(taught[taught != -100])
    assert text == "this" + student.end_token, "the answer alone is learnt"
    alone = student.encode([shown[0]], prompts[:1]).inputs["input_ids"].shape[1]
    tokens = sum(map(student.clip_tokens, clips[:2])) + student.num_image_tokens(*picture.shape[:2])
    assert alone == len(student.tokenizer(prompts[0])["input_ids"]) - 3 + tokens
    with pytest.raises(SampleError, match="has 2 videos and 1 images, but 1 clips and 1 pictures are given"):
        student.encode([shown[0][:2]], prompts[:1])


@pytest.mark.parametrize(("height", "width"), [(70, 41), (48, 100), (20, 90)])
@pytest.mark.parametrize("name", list(SAVERS))
def test_resized_videos_keep_their_places(name, height, width):
    """A ramp over the frame has, over the pixels that a token sees, the mean of the token's centre."""
    student = without_mixing(name)
    pixels = np.zeros((2, height, width, 3))
    pixels[..., 1] = ((np.arange(height) + 0.5) / height)[None, :, None]
    pixels[..., 2] = ((np.arange(width) + 0.5) / width)[None, None, :]
    clip = Clip((pixels * 255).round().astype(np.uint8), [0.0, 0.5], 1.0)
    inputs = encoded(student, [clip])
    (grid,), (positions,) = student.grids(inputs, [clip])
    if name in QWENS:  # keeps the aspect
        assert grid.rows / grid.columns == pytest.approx(height / width, rel=0.45)
    sides = torch.stack([torch.tensor([grid.row_edges.diff().min(), grid.column_edges.diff().min()])])
    seen = pixels_seen(student, inputs)
    for token, position in enumerate(positions.tolist()):
        _, (top, left, bottom, right) = grid.cell(token)
        centre = seen[0, position][:, 1:].mean(dim=0) / 255
        assert ((centre - torch.tensor([(top + bottom) / 2, (left + right) / 2])).abs() < sides / 4).all()


@pytest.mark.parametrize(("name", "config", "settings", "size", "shape", "covered"), [
    # transformers' default configurations are those of the public checkpoints
    ("qwen2_vl", Qwen2VLConfig, {"patch_size": 14}, (280, 448), (1, 10, 16), 1.0),
    ("qwen2_5_vl", Qwen2_5_VLConfig, {"patch_size": 14}, (280, 448), (1, 10, 16), 1.0),
    ("qwen3_vl", Qwen3VLConfig, {"patch_size": 16}, (320, 480), (1, 10, 15), 1.0),
    ("internvl", InternVLConfig, {"size": {"height": 448, "width": 448}}, (90, 160), (2, 16, 16), 1.0),
    ("llava_onevision", LlavaOnevisionConfig, {"size": {"height": 384, "width": 384}}, (90, 160), (2, 14, 14),
     378 / 384),
])  # fmt: skip
def test_grids_of_the_public_checkpoints_sizes(name, config, settings, size, shape, covered):
    student = family_student(name)
    processor = student.processor
    processor.video_processor = type(processor.video_processor)(**settings)
    processor.image_seq_length, processor.num_image_tokens = 256, 729
    ours = student.model.config.to_dict()
    tokens = {key: value for key, value in ours.items() if re.search("token_(id|index)$", key)}
    student.model = SimpleNamespace(config=config(**tokens), device="cpu")
    student._check_processor()
    clip = coded_clip(1, 2, *size)
    inputs = encoded(student, [clip])
    (grid,), _ = student.grids(inputs, [clip])
    assert grid.shape == shape
    assert float(grid.row_edges[-1]) == pytest.approx(0.1 + 0.8 * covered) and float(grid.row_edges[0]) == 0.1
    assert float(grid.column_edges[-1]) == pytest.approx(0.2 + 0.6 * covered)
