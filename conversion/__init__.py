"""Upstream checkpoints to zoo checkpoints and back, a script an architecture: `python -m conversion.llava SRC DST`."""
