"""vlm-zoo: vision-language architectures for transformers, in which the fusion paradigm is one choice.

Importing the package registers every architecture with the Auto classes.
"""

from .building import BuildError, build
from .explain import explain
from .registry import ZOO, AutoModelForVision2Seq, ZooEntry
from .version import __version__


__all__ = ["ZOO", "AutoModelForVision2Seq", "BuildError", "ZooEntry", "__version__", "build", "explain"]
