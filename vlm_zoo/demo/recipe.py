"""The embedded default: parts, stages and sizes of the demo.

What is known about learning from scratch at this size: with the default initialiser (0.02) a narrow language model
never uses the image; pages are not learned without tiles first; one tower layer beats two at this budget.
"""

from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Stage:
    """
    One stage of training.

    name: of the stage, and of its folder.
    dataset: a key of `vlm_zoo.data.DATASETS`.
    image_size: side of the image the tower sees, in pixels.
    train: the parts that train. From scratch there is nothing to keep frozen.
    epochs, batch_size, learning_rate: of TRL's trainer.
    shift, colour: augmentation; pixels an image moves at most, and how far its channels are scaled.
    """

    name: str
    dataset: str
    image_size: int
    epochs: float
    batch_size: int = 32
    learning_rate: float = 1e-3
    shift: int = 0
    colour: float = 0.0
    train: tuple[str, ...] = ("vision", "connector", "fusion", "language", "embeddings", "head")


@dataclass(frozen=True)
class Recipe:
    """
    A whole run.

    sample: rows of each validation split that are answered for the report.
    """

    stages: tuple[Stage, ...]
    vision: dict = field(default_factory=dict)
    language: dict = field(default_factory=dict)
    sample: int = 500
    seed: int = 0

    def to_dict(self) -> dict:
        return asdict(self)


VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 48,
    "patch_size": 16,
    "vision_use_head": False,
    "initializer_range": 0.12,
}

LANGUAGE = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "initializer_range": 0.12,
}

FULL = Recipe(
    vision=VISION,
    language=LANGUAGE,
    stages=(
        Stage("alignment", "emoji_tiles", image_size=48, epochs=10, shift=2, colour=0.1),
        Stage("instruction", "emoji_pages", image_size=96, epochs=3.5),
    ),
)
FAST = Recipe(
    vision=VISION,
    language=LANGUAGE,
    stages=(Stage("alignment", "emoji_tiles", image_size=48, epochs=3),),
    sample=300,
)
