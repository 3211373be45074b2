"""The demo: a small vision-language model from its parts to right answers, on real drawings, in minutes on two
cores."""

from .run import run


__all__ = ["run"]
