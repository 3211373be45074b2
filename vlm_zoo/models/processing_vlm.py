"""The frame's processor: text and images to a batch in which every visual token has its placeholder.

`num_image_tokens(height, width)` is the only source of counts: the placeholders of a batch, the estimates that
servers ask for before they see pixels, and the check in the model all agree because they come from it.
"""

import numpy as np
from transformers import BatchFeature, ProcessorMixin
from transformers.audio_utils import AudioInput
from transformers.image_utils import ImageInput
from transformers.processing_utils import MultiModalData, ProcessingKwargs, Unpack
from transformers.tokenization_utils_base import PreTokenizedInput, TextInput
from transformers.video_utils import VideoInput

from .parts_vlm import pair


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


class ZooProcessor(ProcessorMixin):
    """
    Image processor and tokenizer in one. An architecture writes `num_image_tokens` and its own `__init__`.

    The tokenizer must have a named image token (`extra_special_tokens={"image_token": "<image>"}`; `vlm_zoo.build`
    adds it), which stands once for each image in the text that is handed in.
    """

    _auto_class = "AutoProcessor"

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        if getattr(tokenizer, "image_token", None) is None:
            raise ValueError(
                f"The tokenizer ({type(tokenizer).__name__}) has no named image token. Load it with "
                "AutoTokenizer.from_pretrained(folder, image_token='<image>'), or let vlm_zoo.build make the "
                "processor."
            )
        self.image_token = tokenizer.image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(tokenizer.image_token)
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
            num_image_patches=[1] * len(image_sizes),
        )

    def __call__(
        self,
        images: ImageInput | None = None,
        text: TextInput | PreTokenizedInput | list[TextInput] | list[PreTokenizedInput] | None = None,
        videos: VideoInput | None = None,
        audio: AudioInput | None = None,
        **kwargs: Unpack[ProcessingKwargs],
    ) -> BatchFeature:
        """
        Prepares a batch.

        Args:
            images: images, or a list of them for each text: PIL, arrays, tensors, paths or URLs.
            text: one text or several, with one image token for each image.

        Returns:
            `input_ids`, `attention_mask` and the image processor's outputs.

        Raises:
            ValueError: when images and image tokens differ in number, or when truncation would cut placeholders.
        """
        if text is not None and not isinstance(text, str) and len(text) == 0:
            raise ValueError("Got an empty list of texts: the batch has no row.")
        self._check_rows(images, text)
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
        encoded = self._encode_expanded(text, replacements, text_kwargs)
        if return_types:
            encoded["mm_token_type_ids"] = self.create_mm_token_type_ids(encoded["input_ids"])
        return BatchFeature({**encoded, **processed}, tensor_type=text_kwargs.get("return_tensors"))

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

    def _encode_expanded(self, text: list[str], replacements: list[str], text_kwargs: dict) -> dict:
        """
        Tokenises the short text and repeats ids: what tokenising the expanded text gives, without reading hundreds of
        identical placeholders. Replacements that are more than image tokens are tokenised once each.
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
        encoded = self.tokenizer(text, **plain)
        token, ids_of = self.image_token, {}
        rest = iter(replacements)
        for row, ids in enumerate(encoded["input_ids"]):
            ids = np.asarray(ids, dtype=np.int64)
            positions = np.flatnonzero(ids == self.image_token_id)
            if len(positions) == 0:
                continue
            pieces, last, repeats = [], 0, np.ones(len(ids), dtype=np.int64)
            for position in positions:
                replacement = next(rest)
                if replacement not in ids_of:
                    only_tokens = replacement == token * (len(replacement) // len(token))
                    ids_of[replacement] = (
                        np.full(len(replacement) // len(token), self.image_token_id)
                        if only_tokens
                        else np.asarray(self.tokenizer(replacement, add_special_tokens=False)["input_ids"])
                    )
                pieces += [ids[last:position], ids_of[replacement]]
                repeats[position] = len(ids_of[replacement])
                last = position + 1
            encoded["input_ids"][row] = np.concatenate([*pieces, ids[last:]]).tolist()
            for name in encoded.keys() - {"input_ids"}:  # attention_mask, and token_type_ids of those who make them
                encoded[name][row] = np.repeat(encoded[name][row], repeats).tolist()
        if padding.get("padding") not in (None, False, "do_not_pad"):
            encoded = self.tokenizer.pad(encoded, padding_side=side, **padding)
        if text_kwargs.get("return_tensors") is not None and len(set(map(len, encoded["input_ids"]))) == 1:
            # torch.tensor reads a list of lists number by number; numpy is five times faster
            return {name: np.array(rows, dtype=np.int64) for name, rows in encoded.items()}
        return dict(encoded)
