"""Tiny models, and the contract that every vision-language model should keep."""

from .contract import Check, ContractReport, ContractViolation, check_vlm
from .tiny import TINY_NATIVE_VISION, TINY_TEXT, TINY_VISION, tiny_config, tiny_model, tiny_processor, tiny_tokenizer


__all__ = [
    "Check",
    "ContractReport",
    "ContractViolation",
    "check_vlm",
    "TINY_NATIVE_VISION",
    "TINY_TEXT",
    "TINY_VISION",
    "tiny_config",
    "tiny_model",
    "tiny_processor",
    "tiny_tokenizer",
]
