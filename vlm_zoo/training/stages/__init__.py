"""The stages of the field as YAML files for `trl sft --config`, and as keyword arguments of `SFTConfig`."""

from importlib.resources import files

import yaml


STAGES = ("alignment", "instruction")


def stage(name: str) -> dict:
    """
    The settings of a stage: `SFTConfig(output_dir=…, **stage("alignment"))`.

    Raises:
        ValueError: for a name that is not among `STAGES`.
    """
    if name not in STAGES:
        raise ValueError(f"Unknown stage '{name}'; the stages are {', '.join(STAGES)}.")
    return yaml.safe_load((files(__package__) / f"{name}.yaml").read_text(encoding="utf-8"))
