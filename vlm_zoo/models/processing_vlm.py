"""The frame's processor: text and images to a batch in which every visual token has its placeholder.

`num_image_tokens(height, width)` is the only source of counts: the placeholders of a batch, the estimates that
servers ask for before they see pixels, and the check in the model all agree because they come from it.

A video is an image with several frames. Its marker in the text is treated as an image token, and its `Clip` takes its
place among the images; what follows knows images alone, some of which are clips.
"""

from collections.abc import Mapping
from itertools import chain
from typing import Any

import numpy as np
from transformers import BatchFeature, ProcessorMixin
from transformers.audio_utils import AudioInput
from transformers.image_utils import ImageInput
from transformers.processing_utils import MultiModalData, ProcessingKwargs, Unpack, VideosKwargs
from transformers.tokenization_utils_base import PreTokenizedInput, TextInput
from transformers.video_utils import VideoInput

from .parts_vlm import pair
from .video_vlm import Clip, VideoError, flat_items, list_videos, number_of_axes, read_clip, video_marker


# Tokenizer options whose result depends on the expanded text itself; with them the text is expanded before tokenising.
_NEEDS_EXPANDED_TEXT = (
    "truncation",
    "text_pair",
    "text_target",
    "is_split_into_words",
    "return_offsets_mapping",
    "return_overflowing_tokens",
    "return_special_tokens_mask",
    "return_token_type_ids",
    "return_length",
    "stride",
    "split_special_tokens",
)


# Options of `read_clip` that a call, or an architecture's `clip_options`, may give.
_CLIP_OPTIONS = ("fps", "num_frames", "do_sample_frames", "min_frames", "max_frames", "max_pixels", "frame_multiple")


class ZooVideosKwargs(VideosKwargs, total=False):
    """
    Options for videos, those of `read_clip`: `fps`, `num_frames`, `do_sample_frames`, `video_metadata`, and

    min_frames, max_frames (`int`, *optional*): bounds of what `fps` samples.
    max_pixels (`int`, *optional*): pixels of a frame in the file, at most; by default those of an image.
    frame_multiple (`int`, *optional*): `fps` samples a multiple of this where it can.
    """

    min_frames: int | None
    max_frames: int | None
    max_pixels: int | None
    frame_multiple: int | None


class ZooProcessingKwargs(ProcessingKwargs, total=False):
    """Options of a call; pixels of clips are made with `images_kwargs`."""

    videos_kwargs: ZooVideosKwargs


class ZooProcessor(ProcessorMixin):
    """
    Image processor and tokenizer in one. An architecture writes `num_image_tokens` and its own `__init__`.

    The tokenizer must have a named image token (`extra_special_tokens={"image_token": "<image>"}`; `vlm_zoo.build`
    adds it), which stands once for each image in the text that is handed in.

    An architecture that takes clips sets `takes_clips` and writes `_process_images` unless its image processor takes
    each `Clip` for an image. Then `video_token` is the marker of a video in the text; otherwise it is `None`.
    """

    _auto_class = "AutoProcessor"
    valid_processor_kwargs = ZooProcessingKwargs
    takes_clips = False

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        if getattr(tokenizer, "image_token", None) is None:
            raise ValueError(
                f"The tokenizer ({type(tokenizer).__name__}) has no named image token. Load it with "
                "AutoTokenizer.from_pretrained(folder, image_token='<image>'), or let vlm_zoo.build make the "
                "processor."
            )
        self.image_token = tokenizer.image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(tokenizer.image_token)
        self.video_token = video_marker(tokenizer) if self.takes_clips else None
        # Always there, so that saving changes nothing about a processor.
        self.auto_map = {"AutoProcessor": f"{type(self).__module__.rsplit('.', 1)[-1]}.{type(self).__name__}"}
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def fields_from(cls, config) -> dict:
        """The fields of this processor that a model's config decides."""
        raise NotImplementedError

    @classmethod
    def image_fields_from(cls, config) -> dict:
        """The fields of the image processor that a model's config decides."""
        height, width = pair(config.vision_config.image_size)
        return {"size": {"height": height, "width": width}, "do_center_crop": False}

    @property
    def clip_options(self) -> dict[str, Any]:
        """Defaults of `read_clip`."""
        return {}

    @property
    def caption_tokenizer(self):
        """The tokenizer with which connectors read text of their own."""
        return self.tokenizer

    def num_image_tokens(self, height: int, width: int, **images_kwargs) -> int:
        """
        How many placeholders an image of this size becomes.

        Args:
            height, width: of the original image in pixels, as it is displayed (EXIF orientation applied).
            images_kwargs: options of the image processor that replace its own for this call.
        """
        raise NotImplementedError

    def num_pixel_rows(self, height: int, width: int, **images_kwargs) -> int:
        """How many rows of `pixel_values` an image of this size becomes: one, or at native resolution its patches."""
        if self.image_processor.merge_size is None:
            return 1
        return self.image_processor.num_patches(height, width, **images_kwargs)

    def image_text(self, num_tokens: int) -> str:
        """The text that takes the place of one image token."""
        return self.image_token * num_tokens

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The placeholders of one processed image; processing is idempotent in size, so the processed size will do
        where the original one is not kept."""
        sizes = image_inputs.get("image_sizes")
        height, width = image_inputs["pixel_values"][image_idx].shape[-2:] if sizes is None else sizes[image_idx]
        return self.image_text(self.num_image_tokens(int(height), int(width), **kwargs))

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """
        Counts for images that are not there yet.

        Args:
            image_sizes (`list[list[int]]`): height and width of each image.

        Returns:
            `num_image_tokens` and `num_image_patches` (rows of `pixel_values`), a number for each image.
        """
        if image_sizes is None:
            return MultiModalData()
        images_kwargs = self._merge_kwargs(**kwargs)["images_kwargs"]
        return MultiModalData(
            num_image_tokens=[self.num_image_tokens(height, width, **images_kwargs) for height, width in image_sizes],
            num_image_patches=[self.num_pixel_rows(height, width, **images_kwargs) for height, width in image_sizes],
        )

    def __call__(
        self,
        images: ImageInput | None = None,
        text: TextInput | PreTokenizedInput | list[TextInput] | list[PreTokenizedInput] | None = None,
        videos: VideoInput | None = None,
        audio: AudioInput | None = None,
        **kwargs: Unpack[ZooProcessingKwargs],
    ) -> BatchFeature:
        """
        Prepares a batch.

        Args:
            images:
                Images, or a list of them for each text: PIL, arrays, tensors, paths or URLs. Where there is a list for
                each text, an architecture that takes clips reads a list in place of an image, or an array of four
                axes, as the frames of a clip.
            text: one text or several, with one image token for each image and one `video_token` for each video.
            videos:
                Videos, or a list of them for each text; what a video may be, and what the options `fps`, `num_frames`,
                `do_sample_frames`, `min_frames` and `max_frames` mean, says `read_clip`. `video_metadata` is a list
                with the metadata of each video, or `None` for it. All may also come as `videos_kwargs={...}`.

        Returns:
            `input_ids`, `attention_mask` and the image processor's outputs.

        Raises:
            ValueError: when images and image tokens, or videos and their markers, differ in number, when truncation
                would cut placeholders, when a video cannot be read (`VideoError`), or when there is one and the
                architecture takes none.
        """
        if text is not None and not isinstance(text, str) and len(text) == 0:
            raise ValueError("Got an empty list of texts: the batch has no row.")
        if isinstance(images, list | tuple) and any(isinstance(row, list | tuple) for row in images):
            images = [[] if row is None else row for row in images]  # how data sets store a row without images
        self._check_rows(images, text)
        images, videos = self._with_clips(images, text, videos, kwargs), None
        merged = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        text_kwargs = merged["text_kwargs"]
        if (
            text is None
            or images is None
            or kwargs.get("sanitize_control_tokens")
            or any(text_kwargs.get(name) for name in (*_NEEDS_EXPANDED_TEXT, "return_text_replacement_offsets"))
            or merged["return_text_replacement_offsets"]
            or not self.tokenizer.is_fast
        ):
            return super().__call__(images=images, text=text, videos=videos, audio=audio, **kwargs)
        images, text, videos, audio = self.prepare_inputs_layout(images=images, text=text, videos=videos, audio=audio)
        self.validate_inputs(images=images, text=text, videos=videos, audio=audio, **kwargs)
        processed, replacements = self._process_images(images, **merged["images_kwargs"])
        return_types = text_kwargs.pop("return_mm_token_type_ids", merged["return_mm_token_type_ids"])
        if self.takes_clips:
            text = [sample.replace(self.video_token, self.image_token) for sample in text]
        encoded = self._encode_expanded(text, replacements, text_kwargs)
        if return_types:
            encoded["mm_token_type_ids"] = self.create_mm_token_type_ids(encoded["input_ids"])
        return BatchFeature({**encoded, **processed}, tensor_type=text_kwargs.get("return_tensors"))

    def _expanded(self, text: list[str], replacements: list[str]) -> list[str]:
        rest, rows = iter(replacements), [sample.split(self.image_token) for sample in text]
        return ["".join([first, *(next(rest) + piece for piece in pieces)]) for first, *pieces in rows]

    def _check_rows(self, images, text) -> None:
        """Raises `ValueError` when images that are given row by row do not fit the image tokens of their rows."""
        if not isinstance(text, list | tuple) or not isinstance(images, list | tuple) or len(images) != len(text):
            return
        if not all(isinstance(sample, str) for sample in text) or not all(
            isinstance(own, list | tuple) for own in images
        ):
            return
        found, given = [sample.count(self.image_token) for sample in text], [len(own) for own in images]
        if sum(found) != sum(given):
            return  # the base class counts the whole batch, and says so
        for row, (tokens, own) in enumerate(zip(found, given, strict=True)):
            if tokens != own:
                raise ValueError(
                    f"The number of {self.image_token} tokens in row {row} should be the same as the number of its "
                    f"images. Found {tokens} {self.image_token} tokens and {own} images."
                )

    # --- clips -------------------------------------------------------------------------------------------------------

    def _with_clips(self, images, text, videos, kwargs: dict[str, Any]):
        """Images row by row, each video's clip in its place; images as they came where there is no clip."""
        videos, in_rows = list_videos(videos)
        if not self.takes_clips:
            if videos:
                raise ValueError(
                    f"{type(self).__name__} takes images, no videos: give frames as images, or use an architecture "
                    "that takes clips, such as flamingo or mrope."
                )
            return images
        images = self._read_nested(images, kwargs)
        if text is None:
            return [*flat_items(images), *self._read_videos(videos, kwargs)] if videos else images
        samples = [text] if isinstance(text, str) else text
        if not isinstance(samples, list | tuple) or not all(isinstance(sample, str) for sample in samples):
            raise ValueError(f"text must be a string or a list of strings, got {type(text).__name__}: {text!r:.80}")
        if not videos and not any(self.video_token in sample for sample in samples):
            return images
        markers = self._markers(samples)
        self._check_videos([row.count("video") for row in markers], len(videos), in_rows)
        pictures, places = flat_items(images), sum(row.count("image") for row in markers)
        if len(pictures) != places:
            raise ValueError(
                f"The total number of {self.image_token} tokens in the text should be the number of images. Found "
                f"{places} {self.image_token} tokens and {len(pictures)} images."
            )
        if not videos:
            return images
        rest = {"image": iter(pictures), "video": iter(self._read_videos(videos, kwargs))}
        return [[next(rest[kind]) for kind in row] for row in markers]

    def _check_videos(self, found: list[int], given: int, in_rows: list[int] | None) -> None:
        """Raises `ValueError` when the markers of rows do not fit the videos, of all rows or of each."""
        if sum(found) != given:
            raise ValueError(
                f"The number of {self.video_token} markers in the text should be the number of videos. Found "
                f"{sum(found)} markers (row by row {found}) and {given} videos."
            )
        if in_rows is None or len(in_rows) != len(found):
            return
        for row, (markers, own) in enumerate(zip(found, in_rows, strict=True)):
            if markers != own:
                raise ValueError(
                    f"The number of {self.video_token} markers in row {row} should be the number of its videos. Found "
                    f"{markers} markers and {own} videos."
                )

    def _markers(self, text: list[str]) -> list[list[str]]:
        """For each row "image" or "video" for each marker in it, in their order."""
        counts = [sum(sample.count(token) for sample in text) for token in (self.image_token, self.video_token)]
        _, found = super().get_text_with_replacements(list(text), *([""] * count for count in counts))
        return [[marker["type"] for marker in row] for row in found]

    def _clip_options(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of `read_clip`, and `video_metadata`, of a call: its own before those of the architecture."""
        own = kwargs.get("videos_kwargs") or {}
        unknown = own.keys() - {*_CLIP_OPTIONS, "video_metadata", "return_metadata", "return_tensors"}
        if unknown:
            raise ValueError(
                f"videos_kwargs has {sorted(unknown)}, expected options of sampling: {', '.join(_CLIP_OPTIONS)} and "
                "video_metadata. Pixels of clips are made as those of images, with images_kwargs."
            )
        bounds = {"max_pixels": self.image_processor.max_image_pixels}  # the same as for pictures
        merged = {**bounds, **self.clip_options, **self._merge_kwargs(**kwargs)["videos_kwargs"]}
        given = {*own, *kwargs}
        for one, other in (("fps", "num_frames"), ("num_frames", "fps")):
            if one in given and other not in given:
                merged.pop(other, None)
        if "num_frames" not in given and merged.get("num_frames") and merged.get("max_frames"):
            merged["num_frames"] = min(merged["num_frames"], merged["max_frames"])
        names = (*_CLIP_OPTIONS, "video_metadata")
        return {name: merged[name] for name in names if merged.get(name) is not None}

    def _read_videos(self, videos: list, kwargs: dict[str, Any]) -> list[Clip]:
        options = self._clip_options(kwargs)
        metadata = options.pop("video_metadata", None)
        if metadata is None:
            metadata = [None] * len(videos)
        elif isinstance(metadata, Mapping):
            metadata = [metadata]
        else:
            metadata = flat_items([[{}] if entry is None else entry for entry in metadata])
        if len(metadata) != len(videos):
            raise ValueError(
                f"video_metadata has {len(metadata)} entries for {len(videos)} videos; expected one each."
            )
        pairs = enumerate(zip(videos, metadata, strict=True))
        return [read_clip(video, metadata=known, name=f"video {index}", **options) for index, (video, known) in pairs]

    def _read_nested(self, images, kwargs: dict[str, Any]):
        """Lists and arrays of frames that stand in place of images, in images that come row by row, become clips."""

        def holds_frames(item) -> bool:
            return isinstance(item, list | tuple) or number_of_axes(item) == 4

        if not isinstance(images, list | tuple) or not all(isinstance(row, list | tuple) for row in images):
            return images
        if not any(holds_frames(item) for row in images for item in row):
            return images
        options = {
            name: value
            for name, value in self._clip_options(kwargs).items()
            if name in ("fps", "max_frames", "max_pixels")
        }
        return [
            [
                read_clip(item, do_sample_frames=False, name=f"image {index} of row {number}", **options)
                if holds_frames(item)
                else item
                for index, item in enumerate(row)
            ]
            for number, row in enumerate(images)
        ]

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs) -> None:
        """As in transformers; a clip counts as its first frame, and its marker as an image token."""
        if self.takes_clips and isinstance(text, list) and all(isinstance(sample, str) for sample in text):
            text = [sample.replace(self.video_token, self.image_token) for sample in text]
        if self.takes_clips and images is not None:
            if any(isinstance(item, Clip) and len(item.frames) == 0 for item in flat_items(images)):
                raise VideoError("A clip without frames was given.")
            images = [item.frames[0] if isinstance(item, Clip) else item for item in flat_items(images)]
        super().validate_inputs(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def _process_images(self, images, **kwargs) -> tuple[BatchFeature, list[str]]:
        """The pixels of images and clips, and the text that takes the place of each."""
        processed = self.image_processor(images, **kwargs)
        count = len(flat_items(images))
        return processed, [self.replace_image_token(processed, image_idx=index, **kwargs) for index in range(count)]

    def get_text_with_replacements(
        self, text, images_replacements=(), videos_replacements=(), audio_replacements=()
    ) -> tuple[list[str], list]:
        """As in transformers; replacements of clips are among those of images, in the order of the text."""
        if self.takes_clips and images_replacements:
            kinds = chain.from_iterable(self._markers(text))
            pairs = list(zip(kinds, images_replacements, strict=True))
            images_replacements = [replacement for kind, replacement in pairs if kind == "image"]
            videos_replacements = [replacement for kind, replacement in pairs if kind == "video"]
        return super().get_text_with_replacements(
            text, list(images_replacements), list(videos_replacements), list(audio_replacements)
        )

    # --- ids ---------------------------------------------------------------------------------------------------------

    def _encode_expanded(self, text: list[str], replacements: list[str], text_kwargs: dict) -> dict:
        """
        Tokenises the short text and repeats ids: what tokenising the expanded text gives, without reading hundreds of
        identical placeholders. Where a replacement is more than image tokens the expanded text is read, because words
        may join it.
        """
        padding = {
            name: text_kwargs[name] for name in ("padding", "max_length", "pad_to_multiple_of") if name in text_kwargs
        }
        side = text_kwargs.get("padding_side")
        plain = {
            name: value
            for name, value in text_kwargs.items()
            if name not in (*padding, "padding_side", "return_tensors", "return_text_replacement_offsets")
        }
        token, counts = self.image_token, [len(replacement) // len(self.image_token) for replacement in replacements]
        if any(replacement != token * count for replacement, count in zip(replacements, counts, strict=True)):
            encoded = self.tokenizer(self._expanded(text, replacements), **plain)
        else:
            encoded, rest = self.tokenizer(text, **plain), iter(counts)
            for row, ids in enumerate(encoded["input_ids"]):
                places = np.flatnonzero(np.asarray(ids) == self.image_token_id)
                if len(places) == 0:
                    continue
                repeats = np.ones(len(ids), dtype=np.int64)
                repeats[places] = [next(rest) for _ in places]
                for name in encoded:  # input_ids, attention_mask, and token_type_ids of those who make them
                    encoded[name][row] = np.repeat(encoded[name][row], repeats).tolist()
        if padding.get("padding") not in (None, False, "do_not_pad"):
            encoded = self.tokenizer.pad(encoded, padding_side=side, **padding)
        if text_kwargs.get("return_tensors") is not None and len(set(map(len, encoded["input_ids"]))) == 1:
            # torch.tensor reads a list of lists number by number; numpy is five times faster
            return {name: np.array(rows, dtype=np.int64) for name, rows in encoded.items()}
        return dict(encoded)
