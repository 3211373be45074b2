"""Videos: what of a video a model is to see, and when it is shown; videos among images and text."""

import sys
import wave
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from jinja2 import TemplateError
from PIL import Image
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.video_utils import VideoMetadata

from vlm_zoo import ZOO
from vlm_zoo.chat_templates import find_template, plain_template
from vlm_zoo.models import video_vlm
from vlm_zoo.models.video_vlm import Clip, VideoError, list_videos, read_clip
from vlm_zoo.testing import tiny_config, tiny_processor, tiny_tokenizer
from vlm_zoo.training import ZooDataCollator


TAKES_CLIPS = [name for name, entry in ZOO.items() if entry.processor.takes_clips]
TAKES_IMAGES = [name for name in ZOO if name not in TAKES_CLIPS]
# What a tiny config needs so that clips can be taken, and so that an answer depends on them.
OVERRIDES = {"zoo_flamingo": {"gate_init": 1.0}, "zoo_vet": {"vision": "qwen2_vl", "hidden_stride": 2}}
BOTH = "<image> then <video> then <image>"


def frame(level: int, size: tuple[int, int] = (32, 48)) -> np.ndarray:
    return np.full((*size, 3), level, dtype=np.uint8)


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (40, 56, 3), dtype=np.uint8))


def film(count: int, first: int = 0) -> list[Image.Image]:
    return [picture(seed) for seed in range(first, first + count)]


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    """Writes a file of frames that grow brighter by 5 levels each."""
    av = pytest.importorskip("av", reason="files of videos are written, and read, with PyAV")
    folder = tmp_path_factory.mktemp("films")

    def write_file(name: str, count: int = 40, rate: int = 10) -> Path:
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream("mpeg4", rate=rate, options={"b": "2000000"})
            stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
            for index in range(count):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame(20 + 5 * index), format="rgb24")))
            container.mux(stream.encode())
        return folder / name

    return write_file


def film_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with a video token of its own, `<|film|>`."""
    tokenizer = tiny_tokenizer()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        pad_token=tokenizer.pad_token,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        extra_special_tokens={"image_token": "<image>", "video_token": "<|film|>"},
    )


@pytest.fixture(params=TAKES_CLIPS)
def processor(request):
    return tiny_processor(request.param, tiny_config(request.param, **OVERRIDES.get(request.param, {})))


@pytest.fixture
def flamingo():
    return tiny_processor("flamingo")


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source_fps", [1.0, 23.976, 25, 30000 / 1001, 240.0])
@pytest.mark.parametrize("fps", [None, 0.3, 1, 2, 7.5])
def test_frames_are_sampled_as_qwen3_vl_samples_them(source_fps, fps):
    settings = SimpleNamespace(fps=2, min_frames=4, max_frames=50)
    for total in (1, 2, 3, 5, 48, 100, 1234):
        metadata = VideoMetadata(total_num_frames=total, fps=source_fps)
        expected = Qwen3VLVideoProcessor.sample_frames(settings, metadata, fps=fps).tolist()
        found = read_clip([frame(0)] * total, fps=fps, metadata={"fps": source_fps}, max_frames=50)
        assert found.times == [index / source_fps for index in expected]


def test_a_number_of_frames_lies_evenly_from_the_first_to_the_last():
    frames = film(9)
    clip = read_clip(frames, num_frames=3, metadata={"fps": 4})
    assert clip.frames == [frames[0], frames[4], frames[8]] and clip.times == [0.0, 1.0, 2.0]
    assert clip.fps == pytest.approx(3 / (9 / 4))


def test_a_number_of_frames_is_taken_of_frames_of_unknown_speed_too():
    assert read_clip(film(9), num_frames=3).times == [0.0, 2.0, 4.0]


def test_a_video_with_fewer_frames_than_asked_gives_all_of_them():
    assert len(read_clip(film(3), num_frames=8).frames) == 3


def test_frames_are_taken_as_a_data_set_without_features_stores_them():
    frames = film(3)
    stored = Dataset.from_list([{"images": [frames]}])[0]["images"][0]
    assert isinstance(stored[0], dict)
    clip = read_clip(stored)
    assert [frame.convert("RGB").tobytes() for frame in clip.frames] == [frame.tobytes() for frame in frames]
    with pytest.raises(VideoError, match="a frame of 3 bytes that are no picture"):
        read_clip([{"bytes": b"abc", "path": None}])


def test_a_frame_that_would_be_a_huge_picture_is_refused(monkeypatch):
    buffer = BytesIO()
    picture(0).save(buffer, "png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(VideoError, match=r"bytes that would be a huge picture: .* exceeds limit of 200 pixels"):
        read_clip([{"bytes": buffer.getvalue(), "path": None}])


def test_pictures_with_more_pixels_than_a_frame_may_have_are_refused():
    assert len(read_clip(film(2), max_pixels=40 * 56).frames) == 2
    with pytest.raises(VideoError, match=r"the video has frames of 56 x 40 pixels .*, 2240 each, .* max_pixels=2239"):
        read_clip(film(2), max_pixels=2239)


def test_frames_of_unknown_speed_were_sampled_at_two_a_second():
    clip = read_clip(film(3))
    assert clip.times == [0.0, 0.5, 1.0] and clip.fps == 2.0


def test_frames_of_unknown_speed_were_sampled_as_the_option_says():
    clip = read_clip(film(3), fps=0.5)
    assert clip.times == [0.0, 2.0, 4.0] and clip.fps == 0.5


def test_the_number_of_sampled_frames_is_bounded():
    metadata = {"fps": 10}
    assert len(read_clip([frame(0)] * 100, metadata=metadata, max_frames=7).frames) == 7
    assert len(read_clip([frame(0)] * 100, fps=0.01, metadata=metadata, min_frames=6).frames) == 6
    assert len(read_clip([frame(0)] * 5, fps=0.01, metadata=metadata, min_frames=6).frames) == 5


def test_either_bound_of_the_sampled_frames_may_be_given_alone():
    frames, metadata = [frame(0)] * 1000, {"fps": 1000}
    assert len(read_clip(frames, metadata=metadata).frames) == 4
    assert len(read_clip(frames, metadata=metadata, max_frames=2).frames) == 2
    assert len(read_clip(frames, metadata=metadata, min_frames=900).frames) == 900


@pytest.mark.parametrize(
    ("seconds", "bounds", "expected"),
    [
        (3.5, {"min_frames": 1}, 6),  # 7 frames, rounded down
        (3.5, {"min_frames": 7}, 8),  # up, where down is too few
        (3.5, {"min_frames": 7, "max_frames": 7}, 6),  # the upper bound goes before
        (0.5, {"min_frames": 1}, 2),  # 1 frame becomes one group
    ],
)
def test_the_number_of_sampled_frames_is_a_multiple_where_the_bounds_allow_it(seconds, bounds, expected):
    frames = [frame(0)] * int(seconds * 10)
    assert len(read_clip(frames, metadata={"fps": 10}, frame_multiple=2, **bounds).frames) == expected


def test_a_single_frame_is_no_multiple_and_is_taken():
    assert len(read_clip([frame(0)], metadata={"fps": 10}, frame_multiple=2).frames) == 1


def test_all_frames_are_taken_where_none_are_to_be_sampled():
    clip = read_clip(film(9), fps=1, do_sample_frames=False, metadata={"fps": 3})
    assert len(clip.frames) == 9 and clip.times[3] == 1.0 and clip.fps == 3


def test_frames_that_were_taken_out_of_a_video_keep_their_times_in_it():
    metadata = VideoMetadata(total_num_frames=100, fps=25.0, frames_indices=[0, 20, 60, 99])
    clip = read_clip(film(4), fps=1, metadata=metadata)
    assert clip.times == [0.0, 0.8, 2.4, 3.96] and clip.fps == 1.0


def test_frames_that_were_taken_out_of_a_video_are_sampled_further():
    metadata = {"total_num_frames": 100, "fps": 25.0, "frames_indices": list(range(0, 100, 10))}
    assert read_clip(film(10), num_frames=2, metadata=metadata).times == [0.0, 3.6]


def test_an_array_is_its_frames_whichever_axis_holds_the_channels():
    pixels = np.stack([frame(level) for level in (0, 50, 100)])
    assert [array[0, 0, 0] for array in read_clip(pixels).frames] == [0, 50, 100]
    tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    assert [tuple(array.shape) for array in read_clip(tensor).frames] == [(3, 32, 48)] * 3


def test_a_clip_is_read_as_it_is():
    clip = Clip(film(2), [0.0, 9.0], 0.1)
    assert read_clip(clip, num_frames=1) is clip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fps": 1, "num_frames": 4}, "both fps=1 and num_frames=4"),
        ({"fps": 0}, "fps must be a positive number, got 0"),
        ({"fps": float("nan")}, "fps must be a positive number, got nan"),
        ({"num_frames": 0}, "num_frames must lie between 1 and max_frames=768, got 0"),
        ({"num_frames": 9, "max_frames": 8}, "max_frames=8, got 9"),
        ({"min_frames": 9, "max_frames": 8}, "min_frames <= max_frames"),
        ({"min_frames": 0}, "1 <= min_frames"),
        ({"max_frames": 0}, "1 <= min_frames"),
        ({"frame_multiple": 0}, "frame_multiple >= 1"),
        ({"max_pixels": 0}, "max_pixels must be at least 1, got 0"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        read_clip(film(3), **options)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        ([], "the video is a clip without frames"),
        (np.zeros((0, 4, 4, 3), np.uint8), "clip without frames"),
        (None, "is of type NoneType, expected a path or URL, a list of pictures"),
        (np.zeros((4, 4, 3), np.uint8), "of type ndarray with 3 axes, expected"),
        ([picture(0), None], "has a frame 1 of type NoneType"),
        ([np.zeros((2, 4, 4, 3))], "has a frame 0 of type ndarray with 4 axes"),
        ("no/such/film.mp4", "is no file or URL: 'no/such/film.mp4'"),
    ],
)
def test_what_is_no_video_is_refused(video, message):
    pytest.importorskip("av", reason="without PyAV a path is refused before it is looked at")
    with pytest.raises(VideoError, match=message):
        read_clip(video)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"fps": 0}, "fps=0 in its metadata"),
        ({"fps": 25, "total_num_frames": 100}, "has 3 frames, its metadata counts total_num_frames=100"),
        ({"fps": 25, "frames_indices": [0, 1]}, r"has 3 frames, its metadata says frames_indices=\[0, 1\]"),
        ({"fps": 25, "frames_indices": []}, r"frames_indices=\[\]"),
        ({"fps": 25, "frames_indices": [0, 2, 1]}, "expected an ascending index"),
        ({"fps": 25, "frames_indices": [0, 2, 9], "total_num_frames": 9}, "total_num_frames=9"),
    ],
)
def test_metadata_that_does_not_fit_its_frames_is_refused(metadata, message):
    with pytest.raises(VideoError, match=message):
        read_clip(film(3), metadata=metadata)


@pytest.mark.parametrize("options", [{}, {"do_sample_frames": False, "metadata": {"fps": 10}}])
def test_more_frames_than_may_be_taken_are_refused_where_none_are_to_be_left_out(options):
    with pytest.raises(VideoError, match="has 9 frames, more than max_frames=8: give num_frames"):
        read_clip(film(9), max_frames=8, **options)


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def loaded(monkeypatch):
    """The frames and metadata of every file that was decoded."""
    given, load = [], video_vlm.load_video

    def spy(*args, **kwargs):
        given.append(load(*args, **kwargs))
        return given[-1]

    monkeypatch.setattr(video_vlm, "load_video", spy)
    return given


@pytest.mark.parametrize("name", ["film.mp4", "film.avi", "film.mkv"])  # the header of mkv counts no frames
def test_a_file_gives_its_frames_at_their_times(write, name):
    clip = read_clip(write(name), fps=2)
    assert clip.times == [index / 10 for index in (0, 6, 11, 17, 22, 28, 33, 39)] and clip.fps == 2.0
    found = [pixels.mean() for pixels in clip.frames]
    assert found == pytest.approx([20 + 50 * time for time in clip.times], abs=3)
    assert all(pixels.shape == (32, 48, 3) and pixels.dtype == np.uint8 for pixels in clip.frames)


def test_only_the_sampled_frames_of_a_file_are_kept(write, loaded):
    read_clip(str(write("film.mp4")), num_frames=3)
    assert [len(pixels) for pixels, _ in loaded] == [3]


def test_a_file_of_large_frames_is_refused_before_it_is_decoded(write, loaded):
    path, message = (
        write("film.mp4"),
        r"the video has frames of 48 x 32 pixels .*, 1536 each, more than max_pixels=1535",
    )
    with pytest.raises(VideoError, match=message):
        read_clip(path, max_pixels=1535)
    assert not loaded
    assert len(read_clip(path, max_pixels=1536, num_frames=2).frames) == 2


def test_no_more_frames_of_a_file_are_decoded_than_may_be_taken(write, loaded):
    read_clip(write("film.mp4"), fps=10, max_frames=2)
    assert [len(pixels) for pixels, _ in loaded] == [2]
    with pytest.raises(VideoError, match="has 40 frames, more than max_frames=2"):
        read_clip(write("film.mp4"), do_sample_frames=False, max_frames=2)
    assert len(loaded) == 1


def test_all_frames_of_a_file_may_be_taken(write):
    assert len(read_clip(write("film.mp4"), do_sample_frames=False).frames) == 40
    with pytest.raises(VideoError, match="has 40 frames, more than max_frames=20"):
        read_clip(write("film.mp4"), do_sample_frames=False, max_frames=20)


def test_a_file_may_come_from_a_url(write, monkeypatch):
    content = write("film.mp4").read_bytes()
    monkeypatch.setattr("transformers.video_utils.httpx.get", lambda url, **kwargs: SimpleNamespace(content=content))
    assert read_clip("https://example.com/film.mp4", num_frames=2).times == [0.0, 3.9]


def test_a_url_whose_header_counts_no_frames_is_refused(write, monkeypatch):
    content = write("film.mkv").read_bytes()
    monkeypatch.setattr("transformers.video_utils.httpx.get", lambda url, **kwargs: SimpleNamespace(content=content))
    with pytest.raises(VideoError, match="does not say how many frames it has"):
        read_clip("https://example.com/film.mkv")


@pytest.mark.parametrize(
    ("name", "left", "message"),
    [("cut.avi", 0.9, "ends after .* of 40 frames"), ("cut.avi", 0.5, "damaged"), ("cut.mp4", 0.5, "damaged")],
)
def test_a_truncated_file_is_refused(write, name, left, message):
    path = write(name)
    path.write_bytes(path.read_bytes()[: int(left * path.stat().st_size)])
    with pytest.raises(VideoError, match=message):
        read_clip(path)


@pytest.mark.parametrize("content", [b"", b"words, and no film\n" * 99, bytes(range(256)) * 40])
def test_a_file_that_is_no_video_is_refused(content, tmp_path):
    pytest.importorskip("av", reason="files of videos are read with PyAV")
    (tmp_path / "film.mp4").write_bytes(content)
    with pytest.raises(VideoError, match=r"could not be read, .*film.mp4' is no video or is damaged"):
        read_clip(tmp_path / "film.mp4")


def test_a_file_of_sound_alone_is_refused(tmp_path):
    pytest.importorskip("av", reason="files of videos are read with PyAV")
    with wave.open(str(tmp_path / "sound.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", "none"))
        file.writeframes(bytes(8000))
    with pytest.raises(VideoError, match=r"has no pictures: .*sound.wav' holds \['audio'\]"):
        read_clip(tmp_path / "sound.wav")


def test_frames_that_a_decoder_does_not_show_are_not_counted(write, monkeypatch):
    count = video_vlm._count
    monkeypatch.setattr(video_vlm, "_count", lambda path, decoded: count(path, decoded) + (0 if decoded else 3))
    clip = read_clip(write("film.mp4"), num_frames=2)
    assert clip.times == [0.0, 3.9]


def test_a_file_that_has_fewer_frames_than_counted_is_refused(write, monkeypatch):
    monkeypatch.setattr(video_vlm, "_count", lambda path, decoded: 50)
    with pytest.raises(VideoError, match="has fewer frames than its header counts"):
        read_clip(write("film.mp4"))


def test_a_file_without_pyav_names_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "film.mp4").write_bytes(b"")
    with pytest.raises(ImportError, match=r"pip install vlm-zoo\[video\]"):
        read_clip(tmp_path / "film.mp4")


# --- batches ---------------------------------------------------------------------------------------------------------


def test_videos_come_in_many_forms():
    clip, pixels = Clip(film(1), [0.0], 2.0), np.zeros((2, 8, 8, 3), np.uint8)
    frames, paths = film(2), ["0.png", "1.png"]
    for given, expected in {
        "nothing": (None, ([], None)),
        "a path": ("film.mp4", (["film.mp4"], None)),
        "paths": (["a.mp4", Path("b.mp4")], (["a.mp4", Path("b.mp4")], None)),
        "frames": (frames, ([frames], None)),
        "films": ([frames, clip, "a.mp4"], ([frames, clip, "a.mp4"], None)),
        "rows": ([[frames, clip], [], ["a.mp4"]], ([frames, clip, "a.mp4"], [2, 0, 1])),
        "rows without a video": ([[None], []], ([], [0, 0])),
        "rows of which one is nothing": ([None, [frames]], ([frames], [0, 1])),
        "a film for each row but one": ([None, frames, "a.mp4"], ([frames, "a.mp4"], [0, 1, 1])),
        "nothing in every row": ([None, None], ([], [0, 0])),
        "rows of frames of paths": ([[paths]], ([paths], [1])),
    }.values():
        assert list_videos(given) == expected
    for given, count in ((pixels, 1), ([pixels, pixels], 2), (np.stack([pixels] * 3), 3), ([[pixels], [pixels]], 2)):
        assert [video.shape for video in list_videos(given)[0]] == [pixels.shape] * count


def test_what_is_no_list_of_videos_is_refused():
    with pytest.raises(VideoError, match="videos is of type int, expected a video, a list of them"):
        list_videos(3)


def test_a_video_is_an_image_with_frames(processor):
    frames = film(4)
    found = processor(text=["see <video> now"], videos=frames, return_tensors="pt")
    assert same(found, processor(text=["see <image> now"], images=[[frames]], return_tensors="pt"))
    assert same(found, processor(text="see <video> now", videos=[[np.stack(frames)]], return_tensors="pt"))
    assert same(found, processor(text=["see <image> now"], images=[[np.stack(frames)]], return_tensors="pt"))
    assert same(found, processor(text=["see <image> now"], images=[[read_clip(frames)]], return_tensors="pt"))
    assert same(found, processor(text=["see <image> now"], images=[read_clip(frames)], return_tensors="pt"))


def test_images_videos_and_text_mix_in_their_order(processor):
    one, other, clips = picture(10), picture(11), [read_clip(film(2)), read_clip(film(3, first=5))]
    texts = [BOTH, "words alone", "<video>"]
    expected = processor(
        text=[text.replace("<video>", "<image>") for text in texts],
        images=[[one, clips[0], other], [], [clips[1]]],
        padding=True,
        return_tensors="pt",
    )
    for images, videos in (
        ([[one, other], [], []], [[clips[0]], [], [clips[1]]]),
        ([one, other], clips),
        ([[one, other], [], []], [clip.frames for clip in clips]),
    ):
        found = processor(text=texts, images=images, videos=videos, padding=True, return_tensors="pt")
        assert same(found, expected)
    turned = processor(text=texts, images=[one, other], videos=clips[::-1], padding=True, return_tensors="pt")
    assert not same(turned, expected)


def test_text_that_is_expanded_first_becomes_the_same_ids(processor):
    given = {"text": [BOTH, "<video>"], "images": [[picture(0), picture(1)], []], "videos": [film(2), film(3)]}
    short = processor(**given, padding=True, return_tensors="pt")
    long = processor(**given, padding=True, truncation=True, max_length=9999, return_tensors="pt")
    assert same(short, long)


def test_text_without_images_and_videos_stays_what_it_is(processor):
    found = processor(text=["words alone"], return_tensors="pt")
    assert found.keys() == {"input_ids", "attention_mask"}
    assert same(found, processor(text=["words alone"], videos=[[]], return_tensors="pt"))


def test_videos_may_come_without_text(processor):
    found = processor(images=[picture(0)], videos=[film(2)], return_tensors="pt")
    assert found["image_grid_thw"].shape == (2, 3)


def test_a_list_without_return_tensors_is_a_list(processor):
    assert isinstance(processor(text=["<video>"], videos=film(2))["input_ids"][0], list)


def test_options_are_taken_flat_and_as_options_of_videos(processor):
    given = {"text": ["<video>"], "videos": [film(8)], "return_tensors": "pt"}
    for options in ({"num_frames": 3}, {"fps": 1, "video_metadata": [{"fps": 2}]}, {"max_frames": 5, "num_frames": 5}):
        flat = processor(**given, **options)
        assert same(flat, processor(**given, videos_kwargs=options)) and not same(flat, processor(**given))


def test_an_option_goes_before_the_architectures_own(flamingo, monkeypatch):
    monkeypatch.setattr(type(flamingo), "clip_options", {"num_frames": 2, "max_frames": 4})

    def frames(**options) -> int:
        batch = flamingo(text=["<video>"], videos=[film(12)], video_metadata={"fps": 4}, **options)
        return int(batch["image_grid_thw"][0][0])

    assert [frames(), frames(num_frames=3), frames(fps=2)] == [2, 3, 4]


def test_each_video_has_its_own_metadata(flamingo):
    metadata = [VideoMetadata(total_num_frames=20, fps=2.0), None]
    batch = flamingo(text=["<video><video>"], videos=[film(20), film(3)], fps=0.5, video_metadata=metadata)
    assert batch["image_grid_thw"].tolist() == [[5, 1, 1], [3, 1, 1]]


def test_files_reach_a_batch(write, processor):
    path, frames = write("film.mp4"), read_clip(write("film.mp4"), num_frames=4)
    found = processor(text=["<video>"], videos=[str(path)], num_frames=4, return_tensors="pt")
    assert same(found, processor(text=["<video>"], videos=[frames], return_tensors="pt"))


def test_frames_may_be_files_of_pictures(flamingo, tmp_path):
    frames = film(2)
    for index, image in enumerate(frames):
        image.save(tmp_path / f"{index}.png")
    paths = [str(tmp_path / f"{index}.png") for index in range(2)]
    found = flamingo(text=["<video>"], videos=[[paths]], return_tensors="pt")
    assert same(found, flamingo(text=["<video>"], videos=[frames], return_tensors="pt"))


@pytest.mark.parametrize("name", TAKES_CLIPS)
def test_a_model_answers_a_video(name):
    config = tiny_config(name, **OVERRIDES.get(name, {}))
    model, processor = ZOO[name].head(config).eval(), tiny_processor(name, config)
    batch = processor(text=["<video> what?"], videos=[film(3)], return_tensors="pt")
    others = processor(text=["<video> what?"], videos=[film(3, first=1)], return_tensors="pt")
    with torch.no_grad():
        assert not torch.equal(model(**batch).logits[:, -1], model(**others).logits[:, -1])


def test_rows_of_a_collator_may_hold_clips(processor):
    messages = [{"role": "user", "content": "Which way?"}, {"role": "assistant", "content": "Left."}]
    clip = read_clip(film(2))
    one, other = (ZooDataCollator(processor)([{"images": [item], "messages": messages}]) for item in (clip, film(2)))
    assert same(one, other) and other["image_grid_thw"].shape == (1, 3)


# --- markers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "videos", "message"),
    [
        (["<video>", "<video><video>"], 2, r"Found 3 markers \(row by row \[1, 2\]\) and 2 videos"),
        (["a", "b"], 1, r"Found 0 markers \(row by row \[0, 0\]\) and 1 videos"),
    ],
)
def test_videos_and_markers_that_differ_in_number_are_counted_on_both_sides(processor, text, videos, message):
    with pytest.raises(ValueError, match=message):
        processor(text=text, videos=[film(2)] * videos)


def test_a_video_that_is_missing_is_counted(processor):
    for images in (None, [film(1)[0]]):
        with pytest.raises(ValueError, match=r"Found 1 markers \(row by row \[1\]\) and 0 videos"):
            processor(text=["<image> and <video>"], images=images)


def test_a_row_that_has_the_video_of_another_is_named(processor):
    with pytest.raises(ValueError, match=r"in row 0 should be the number of its videos. Found 0 markers and 1 videos"):
        processor(text=["a", "<video>"], videos=[[film(2)], []])


def test_a_row_without_videos_may_be_none(processor):
    texts = ["a", "<video>"]
    found = processor(text=texts, videos=[None, [film(2)]], padding=True, return_tensors="pt")
    assert same(found, processor(text=texts, videos=[[], [film(2)]], padding=True, return_tensors="pt"))
    with pytest.raises(ValueError, match=r"in row 0 should be the number of its videos. Found 1 markers and 0 videos"):
        processor(text=texts[::-1], videos=[None, [film(2)]])


@pytest.mark.parametrize(("images", "count"), [(None, 0), ([[]], 0), ([[picture(0)] * 3], 3)])
def test_images_beside_a_video_are_counted_too(processor, images, count):
    with pytest.raises(ValueError, match=f"Found.* 2 <image> tokens and {count} images"):
        processor(text=[BOTH], images=images, videos=film(2))


def test_a_video_does_not_stand_in_for_an_image(processor):
    with pytest.raises(ValueError, match="0 markers"):
        processor(text=["<image>"], videos=[film(2)])


def test_the_marker_is_the_tokenizers_own_video_token():
    processor = ZOO["zoo_flamingo"].processor(tiny_processor("flamingo").image_processor, film_tokenizer())
    assert processor.video_token == "<|film|>"
    batch = processor(text=["a <|film|> b"], videos=[film(2)])
    assert batch["input_ids"] == processor(text=["a <image> b"], images=[[film(2)]])["input_ids"]


# --- errors of a batch -----------------------------------------------------------------------------------------------


def test_errors_name_the_video(processor):
    with pytest.raises(VideoError, match="video 1 has a frame 0 of type NoneType"):
        processor(text=["<video>", "<video>"], videos=[[film(2)], [[None]]])


def test_errors_name_the_image_that_is_a_clip(processor):
    with pytest.raises(VideoError, match="image 1 of row 0 is a clip without frames"):
        processor(text=["<image><image>"], images=[[picture(0), []]])


def test_a_clip_without_frames_is_refused(processor):
    with pytest.raises(ValueError, match="clip without frames"):
        processor(text=["<video>"], videos=[Clip([], [], 2.0)])


def test_options_of_pixels_are_no_options_of_videos(processor):
    with pytest.raises(ValueError, match=r"videos_kwargs has \['size'\], expected options of sampling: fps"):
        processor(text=["<video>"], videos=[film(2)], videos_kwargs={"size": 3})


def test_metadata_for_other_videos_is_refused(processor):
    with pytest.raises(ValueError, match="video_metadata has 2 entries for 1 videos"):
        processor(text=["<video>"], videos=[film(2)], video_metadata=[{"fps": 2}, {"fps": 2}])


def test_text_that_is_no_text_is_refused(processor):
    with pytest.raises(ValueError, match="text must be a string or a list of strings"):
        processor(text=[["<video>"]], videos=[film(2)])


@pytest.mark.parametrize("name", TAKES_IMAGES)
def test_architectures_without_clips_say_so(name):
    processor = tiny_processor(name)
    says = f"{type(processor).__name__} takes images, no videos: give frames as images"
    with pytest.raises(ValueError, match=says):
        processor(text=["<video>"], videos=[film(2)])


@pytest.mark.parametrize("name", TAKES_IMAGES)
def test_a_conversation_with_a_video_is_refused_where_architectures_take_no_clips(name):
    messages = [{"role": "user", "content": [{"type": "video", "video": film(2)}]}]
    for options in ({"tokenize": False}, {"tokenize": True, "return_dict": True}):
        with pytest.raises(TemplateError, match="Content of type video: expected image or text"):
            tiny_processor(name).apply_chat_template(messages, **options)


def test_an_architecture_without_clips_reads_the_marker_as_text():
    processor = tiny_processor("llava")
    ids = processor(text=["a <video> b"], videos=[[]])["input_ids"][0]
    assert processor.video_token is None and "<video>" in processor.decode(ids)


# --- the chat template -----------------------------------------------------------------------------------------------


def conversation(video) -> list[dict]:
    asked = [{"type": "video", "video": video}, {"type": "image", "image": picture(9)}, {"type": "text", "text": "?"}]
    answered = [{"type": "text", "text": "It moves."}]
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]


def test_a_video_comes_through_the_chat_template(processor):
    messages = conversation(film(3))
    found = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    text = processor.apply_chat_template(messages)
    assert text.startswith("USER: <video>\n<image>\n?")
    expected = processor(text=text, images=[picture(9)], videos=[film(3)], return_tensors="pt")
    assert same(found, expected)


def test_a_file_comes_through_the_chat_template(write, processor):
    path = str(write("film.mp4"))
    found = processor.apply_chat_template(
        [conversation(path)] * 2,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"num_frames": 3, "padding": True},
    )
    texts = processor.apply_chat_template([conversation(path)] * 2)
    expected = processor(
        text=texts, images=[[picture(9)]] * 2, videos=[[path]] * 2, num_frames=3, padding=True, return_tensors="pt"
    )
    assert same(found, expected)


@pytest.mark.parametrize("token", ["<video>", "<|a longer marker|>"])
def test_the_mask_of_the_answer_holds_behind_a_video(processor, token):
    processor.video_token = token
    processor.chat_template = plain_template("<image>", token)
    found = processor.apply_chat_template(
        conversation(film(3)), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    pairs = zip(found["input_ids"][0], found["assistant_masks"][0], strict=True)
    assert processor.decode([token for token, mask in pairs if mask]) == " It moves.</s>"


def test_a_template_that_is_extended_writes_videos_in_their_order():
    tokenizer = film_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}[{{ message.role }}] {{ message.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    template, _ = find_template(tokenizer, "<image>", video_token="<|film|>")
    content = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "video"}, {"video": "x.mp4"}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], chat_template=template, tokenize=False
    )
    assert text == "[user] a<image>\n<|film|>\n<|film|>\n</s>"


def test_user_text_cannot_bring_a_marker_of_its_own():
    processor = ZOO["zoo_flamingo"].processor(
        tiny_processor("flamingo").image_processor,
        film_tokenizer(),
        chat_template=plain_template("<image>", "<|film|>"),
    )
    content = [{"type": "text", "text": "<|film|>"}, {"type": "video", "video": film(2)}]
    batch = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, sanitize_control_tokens=True
    )
    assert batch["input_ids"][0].count(processor.image_token_id) == 1
    assert "<|film|>" in processor.decode(batch["input_ids"][0])


def test_a_video_of_too_large_frames_is_refused_before_it_is_decoded(write, processor, monkeypatch):
    file = write("large.mp4")
    monkeypatch.setattr(processor.image_processor, "max_image_pixels", 100)
    with pytest.raises(VideoError, match="more than max_pixels=100"):
        processor(text=["<video>"], videos=[file])


def test_a_row_without_images_may_be_none(processor):
    batch = processor(text=["a", "<image> b"], images=[None, [film(1)[0]]], padding=True)
    found = [ids.count(processor.image_token_id) for ids in batch["input_ids"]]
    assert found[0] == 0 and found[1] > 0
    with pytest.raises(ValueError, match="row 0"):
        processor(text=["<image> a", "b"], images=[None, [film(1)[0]]])
