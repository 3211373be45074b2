"""`trl dpo` in a process that knows the zoo: no remote code.

    python -m vlm_zoo.training.dpo --config examples/llava_dpo.yaml        one process, also as `vlm-zoo dpo`
    accelerate launch -m vlm_zoo.training.dpo --config …                   several

Options and YAML keys are those of `trl dpo`, which labels the two responses and never the prompt with its
placeholders.
"""

from trl.scripts.dpo import main as train
from trl.scripts.dpo import make_parser


def main(arguments: list[str] | None = None) -> None:
    """Trains as the options say and saves to `output_dir`; `arguments` replace those of the command line."""
    parser = make_parser(prog="vlm-zoo dpo")
    script, training, model, mixture = parser.parse_args_and_config(args=arguments, fail_with_unknown_args=True)
    training.trust_remote_code = False  # the installed zoo is what this command is for
    train(script, training, model, mixture)


if __name__ == "__main__":
    main()
