"""vlm-zoo: vision-language architectures for transformers, in which the fusion paradigm is one choice.

Importing the package registers every architecture with the Auto classes.
"""

from .registry import ZOO, AutoModelForVision2Seq, ZooEntry


__version__ = "0.1.0"
__all__ = ["ZOO", "AutoModelForVision2Seq", "ZooEntry", "__version__"]
