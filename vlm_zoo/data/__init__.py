"""The embedded data: compact copies of real drawings with questions, and the tokenizer of the demo.

Each folder holds its own README with sources and licences.
"""

from importlib.resources import files
from pathlib import Path


DATASETS = ("emoji_tiles", "emoji_pages", "emoji_preference", "emoji_video", "emoji_detail")


def path(name: str) -> Path:
    """
    The folder of an embedded data set (or of `tokenizer`), for `datasets.load_dataset(str(path("emoji_tiles")))`.

    Raises:
        ValueError: for a name that is not embedded.
    """
    if name not in (*DATASETS, "tokenizer"):
        raise ValueError(f"No embedded data '{name}'; there are {', '.join(DATASETS)} and tokenizer.")
    return Path(str(files(__package__) / name))
