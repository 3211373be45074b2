"""Videos: a file, an array or a list of pictures becomes a `Clip`, frames with the time of each.

Files are decoded with PyAV through transformers' `load_video`: an extra, `pip install vlm-zoo[video]`. Only the frames
that are sampled are kept. Frames at hand need nothing.

Sampling is Qwen3-VL's (huggingface.co/papers/2511.21631; `Qwen3VLVideoProcessor.sample_frames` of transformers): the
number of frames is `int(total / source_fps * fps)` within bounds, and they lie evenly from the first to the last,
`round(linspace(0, total - 1, number))`. A time is the index of a frame in its source over the source's frames a
second.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import PIL.Image
import torch
from transformers import PreTrainedTokenizerBase
from transformers.video_utils import load_video


# What frames are sampled at, and what frames of unknown speed are taken to be sampled at; Qwen2-VL's and Qwen3-VL's.
DEFAULT_FPS = 2.0

# Bounds of what is sampled by frames a second; Qwen3-VL's.
DEFAULT_MIN_FRAMES, DEFAULT_MAX_FRAMES = 4, 768


class VideoError(ValueError):
    """A video that cannot be used: unreadable, truncated, too large, without frames, or no video at all."""


@dataclass(frozen=True)
class Clip:
    """
    The frames of a video that a model looks at.

    frames: pictures, as an image processor takes them, in their order.
    times (`list[float]`): when each frame is shown, in seconds from the start of the video.
    fps (`float`): frames a second among these, not those of the file.
    """

    frames: list[Any]
    times: list[float]
    fps: float


def read_clip(
    video: Any,
    *,
    fps: float | None = None,
    num_frames: int | None = None,
    do_sample_frames: bool = True,
    metadata: Mapping | None = None,
    min_frames: int | None = None,
    max_frames: int | None = None,
    max_pixels: int | None = None,
    frame_multiple: int = 1,
    name: str = "the video",
) -> Clip:
    """
    Reads a video, and of its frames those that a model is to see.

    Args:
        video:
            A path or URL of a file; a list of pictures (PIL, arrays, tensors, paths); an array or tensor
            `[T, H, W, C]` or `[T, C, H, W]`; or a `Clip`, which is returned as it is.
        fps: frames a second that are sampled, 2 by default.
        num_frames: how many are sampled instead, evenly; all where the video has fewer.
        do_sample_frames: false for all frames.
        metadata:
            Of frames that were taken out of a video: `fps` of the video, `total_num_frames`, and `frames_indices`,
            the place of each frame in it. A file speaks for itself. Without `fps` the frames are taken as sampled
            already, at `fps`; then only `num_frames` leaves any out.
        min_frames, max_frames:
            Bounds of what `fps` samples, as far as the video has so many frames; 4 and 768 by default, or the other
            one where that lies beyond. No option takes more frames than `max_frames`.
        max_pixels:
            Of one frame, none by default. A file of larger frames is refused before any is decoded, and so is a PIL
            picture among frames at hand; arrays are decoded already, and paths of pictures are not opened here.
        frame_multiple: `fps` samples a multiple of this where the bounds allow it.
        name: what errors call the video.

    Raises:
        ImportError: for a file, when PyAV is missing.
        VideoError: when the video is no video, has no frames or is truncated, when its frames have more pixels than
            `max_pixels`, or when there are more of them than `max_frames` and none are to be left out.
        ValueError: when an option is out of range, or both `fps` and `num_frames` are given.
    """
    if isinstance(video, Clip):
        return video
    if fps is not None and num_frames is not None:
        raise ValueError(f"Got both fps={fps} and num_frames={num_frames}: give the one that decides.")
    if fps is not None and not 0 < fps < float("inf"):
        raise ValueError(f"fps must be a positive number, got {fps}.")
    if max_frames is None:
        max_frames = max(DEFAULT_MAX_FRAMES, min_frames or 0)
    if min_frames is None:
        min_frames = min(DEFAULT_MIN_FRAMES, max_frames)
    if not 1 <= min_frames <= max_frames or frame_multiple < 1:
        raise ValueError(
            f"Expected 1 <= min_frames <= max_frames and frame_multiple >= 1, got {min_frames}, {max_frames} and "
            f"{frame_multiple}."
        )
    if num_frames is not None and not 1 <= num_frames <= max_frames:
        raise ValueError(f"num_frames must lie between 1 and max_frames={max_frames}, got {num_frames}.")

    if max_pixels is not None and max_pixels < 1:
        raise ValueError(f"max_pixels must be at least 1, got {max_pixels}.")

    def sample(available: int, seconds: float | None) -> np.ndarray:
        """Which of `available` frames of so many seconds are taken; of unknown speed all, unless they are counted."""
        if do_sample_frames and num_frames is not None:
            number = min(num_frames, available)
        elif do_sample_frames and seconds is not None:
            most = min(max_frames, available)
            number = min(max(int(seconds * (fps or DEFAULT_FPS)), min_frames), most)
            fewer = number // frame_multiple * frame_multiple
            if fewer < min_frames and fewer + frame_multiple <= most:
                fewer += frame_multiple
            number = fewer or number
        elif available > max_frames:
            raise VideoError(
                f"has {available} frames, more than max_frames={max_frames}: give num_frames, or the fps at which to "
                "sample them, for frames at hand beside the fps of their video in the metadata"
            )
        else:
            number = available
        return np.linspace(0, available - 1, number).round().astype(int)

    try:
        if isinstance(video, str | os.PathLike):
            return _read_file(os.fspath(video), sample, max_pixels)
        frames = _frames(video, max_pixels)
        source_fps, places, total = _places(len(frames), metadata)
        chosen = sample(len(frames), None if source_fps is None else total / source_fps)
    except VideoError as error:
        raise VideoError(f"{name} {error}") from error.__cause__
    source_fps = source_fps or fps or DEFAULT_FPS
    return Clip(
        [frames[index] for index in chosen],
        [places[index] / source_fps for index in chosen],
        len(chosen) / total * source_fps,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Frames at hand
# ---------------------------------------------------------------------------------------------------------------------


def number_of_axes(item: Any) -> int:
    """The axes of an array or tensor; 0 of anything else."""
    return item.ndim if isinstance(item, np.ndarray | torch.Tensor) else 0


def _is_picture(item: Any) -> bool:
    return isinstance(item, PIL.Image.Image) or number_of_axes(item) in (2, 3)


def _opened(frame: Any) -> Any:
    """A frame as `datasets` stores it where nothing says that it is an image, or as it came."""
    if not isinstance(frame, Mapping) or not {"bytes", "path"} <= frame.keys():
        return frame
    if frame["bytes"] is None:
        return frame["path"]
    try:
        return PIL.Image.open(BytesIO(frame["bytes"]))
    except PIL.Image.DecompressionBombError as error:
        raise VideoError(
            f"has a frame of {len(frame['bytes'])} bytes that would be a huge picture: {error}"
        ) from error
    except (OSError, ValueError) as error:  # UnidentifiedImageError is an OSError
        raise VideoError(f"has a frame of {len(frame['bytes'])} bytes that are no picture") from error


def _check_size(height: int, width: int, max_pixels: int | None) -> None:
    """Raises `VideoError` when frames have more pixels than they may."""
    if max_pixels is not None and height * width > max_pixels:
        raise VideoError(
            f"has frames of {width} x {height} pixels (width x height), {height * width} each, more than "
            f"max_pixels={max_pixels}: give a smaller version of it"
        )


def _frames(video: Any, max_pixels: int | None) -> list:
    if number_of_axes(video) == 4:
        frames = list(video)
    elif isinstance(video, list | tuple):
        frames = list(map(_opened, video))
        for index, frame in enumerate(frames):
            if not _is_picture(frame) and not isinstance(frame, str | os.PathLike):
                raise VideoError(
                    f"has a frame {index} of {_described(frame)}, expected a PIL picture, an array or tensor of two "
                    "or three axes, or a path"
                )
            if isinstance(frame, PIL.Image.Image):
                _check_size(frame.height, frame.width, max_pixels)
    else:
        raise VideoError(
            f"is of {_described(video)}, expected a path or URL, a list of pictures, or an array or tensor of four "
            "axes"
        )
    if not frames:
        raise VideoError("is a clip without frames")
    return frames


def _described(item: Any) -> str:
    axes = f" with {item.ndim} axes" if isinstance(item, np.ndarray | torch.Tensor) else ""
    return f"type {type(item).__name__}{axes}"


def _places(given: int, metadata: Mapping | None) -> tuple[float | None, list[int], int]:
    """Frames a second of the video that frames come from, `None` if unknown, their places in it, and its length."""
    known = {} if metadata is None else dict(metadata)
    source_fps, places, total = (known.get(name) for name in ("fps", "frames_indices", "total_num_frames"))
    if source_fps is None:
        return None, list(range(given)), given
    if not 0 < source_fps < float("inf"):
        raise VideoError(f"has fps={source_fps} in its metadata, expected a positive number")
    if places is None:
        if total not in (None, given):
            raise VideoError(
                f"has {given} frames, its metadata counts total_num_frames={total}: frames_indices is missing, which "
                "of them are these?"
            )
        return float(source_fps), list(range(given)), given
    places = [int(place) for place in places]
    total = places[-1] + 1 if total is None and places else total
    if len(places) != given or places != sorted(places) or places[0] < 0 or places[-1] >= total:
        raise VideoError(
            f"has {given} frames, its metadata says frames_indices={places} of total_num_frames={total}: expected an "
            "ascending index for each frame"
        )
    return float(source_fps), places, int(total)


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def _pyav():
    # An import inside of try is none that a checkpoint's own code makes everyone install: only files need it.
    try:
        import av
    except ImportError as error:
        raise ImportError("Files of videos are read with PyAV: pip install vlm-zoo[video], or give frames.") from error
    return av


def _read_file(source: str, sample: Callable, max_pixels: int | None) -> Clip:
    """The frames of a file that `sample(available, seconds)` chooses."""
    _pyav()
    is_url = source.startswith(("http://", "https://"))
    if not is_url and not os.path.isfile(source):
        raise VideoError(f"is no file or URL: {source[:200]!r}")
    try:
        # A file is counted, as the headers of some formats say nothing; of a URL what the header says must do.
        clip = _decode(source, sample, None if is_url else _count(source, decoded=False), max_pixels)
        if clip is None and not is_url:  # the file holds frames that the decoder does not show
            clip = _decode(source, sample, _count(source, decoded=True), max_pixels)
    except VideoError:
        raise
    except Exception as error:  # decoders and downloads raise all sorts of errors
        raise VideoError(
            f"could not be read, {source[:200]!r} is no video or is damaged ({type(error).__name__}: "
            f"{str(error)[:200]})"
        ) from error
    if clip is None:
        raise VideoError(f"has fewer frames than its header counts: is {source[:200]!r} truncated?")
    return clip


def _decode(source: str, sample: Callable, count: int | None, max_pixels: int | None) -> Clip | None:
    """The frames chosen among `count`, by default what the header counts; `None` where not all of them are there."""
    total, source_fps = 0, 0.0

    def choose(metadata, **kwargs) -> np.ndarray:
        nonlocal total, source_fps
        _check_size(metadata.height, metadata.width, max_pixels)
        total, source_fps = metadata.total_num_frames if count is None else count, metadata.fps
        if not total or not source_fps:
            raise VideoError(
                f"does not say how many frames it has, or how many a second ({total}, {source_fps}): if "
                f"{source[:200]!r} is a video, download it, or give its frames"
            )
        return sample(total, total / source_fps)

    pixels, metadata = load_video(source, backend="pyav", sample_indices_fn=choose)
    places = [int(place) for place in metadata.frames_indices]
    if len(pixels) != len(places):
        return None
    return Clip(list(pixels), [place / source_fps for place in places], len(places) / total * source_fps)


def _count(path: str, decoded: bool) -> int:
    """How many frames a file holds to be shown, or how many of them a decoder gives, which takes longer."""
    with _pyav().open(path) as container:
        if not container.streams.video:
            raise VideoError(f"has no pictures: {path[:200]!r} holds {[stream.type for stream in container.streams]}")
        stream = container.streams.video[0]
        if decoded:
            stream.thread_type = "AUTO"
            return sum(1 for _ in container.decode(stream))
        packets = [packet.is_discard for packet in container.demux(stream) if packet.size]
        if len(packets) < stream.frames:
            raise VideoError(f"ends after {len(packets)} of {stream.frames} frames: is {path[:200]!r} truncated?")
        return len(packets) - sum(packets)


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------


def video_marker(tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that stands for a video: the tokenizer's named `video_token`, if it has one. It need not be a token,
    since images take its place before anything is tokenised."""
    return getattr(tokenizer, "video_token", None) or "<video>"


def list_videos(videos: Any) -> tuple[list, list[int] | None]:
    """
    The videos of a batch in their order.

    Args:
        videos:
            One video, a list of them, or a list of such lists for the rows. A list of pictures is one video; one of
            paths is as many videos, unless it stands in the list of a row, where it is the frames of one. `None` is a
            row without videos, and makes rows of the entries beside it.

    Returns:
        The videos, and how many each row has, `None` where they do not come row by row.
    """
    if videos is None:
        return [], None
    if _is_video(videos):
        return [videos], None
    if number_of_axes(videos) == 5:
        return list(videos), None
    if not isinstance(videos, list | tuple):
        raise VideoError(
            f"videos is of {_described(videos)}, expected a video, a list of them, or lists for the rows."
        )
    by_row = all(isinstance(entry, list | tuple) and not _is_video(entry) for entry in videos if entry is not None)
    by_row = by_row or any(entry is None for entry in videos)
    rows = [[] if entry is None else [entry] if _is_video(entry) else entry for entry in videos]
    rows = [list(row) if isinstance(row, list | tuple) or number_of_axes(row) == 5 else [row] for row in rows]
    rows = [[video for video in row if video is not None] for row in rows]
    return [video for row in rows for video in row], [len(row) for row in rows] if by_row else None


def _is_video(item: Any) -> bool:
    if isinstance(item, list | tuple):
        return len(item) > 0 and all(map(_is_picture, item))
    return isinstance(item, str | os.PathLike | Clip) or number_of_axes(item) == 4


def flat_items(images: Any) -> list:
    """The pictures and clips of nested lists, in their order; an array of four axes is a batch of pictures."""
    if images is None:
        return []
    if isinstance(images, list | tuple):
        return [item for entry in images for item in flat_items(entry)]
    return list(images) if number_of_axes(images) == 4 else [images]
