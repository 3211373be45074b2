"""`trl sft` in a process that knows the zoo: no remote code, and the zoo's collator.

    python -m vlm_zoo.training.sft --config examples/llava_sft.yaml        one process, also as `vlm-zoo sft`
    accelerate launch -m vlm_zoo.training.sft --config …                   several

Options and YAML keys are those of `trl sft`.
"""

from datasets import load_dataset
from transformers import AutoProcessor
from trl import get_dataset, get_peft_config, get_quantization_config
from trl.scripts.sft import make_parser

from ..registry import ZOO
from .collator import ZooDataCollator
from .trainer import LeanSFTTrainer


def main(arguments: list[str] | None = None) -> LeanSFTTrainer:
    """Trains as the options say and saves to `output_dir`; `arguments` replace those of the command line."""
    parser = make_parser(prog="vlm-zoo sft")
    script, training, model, mixture = parser.parse_args_and_config(args=arguments, fail_with_unknown_args=True)
    if not (mixture.datasets or script.dataset_name):
        raise ValueError("No data: give --dataset_name (a folder or a Hub id) or `datasets:` in the YAML file.")
    data = (
        get_dataset(mixture)
        if mixture.datasets
        else load_dataset(script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming)
    )
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(training.model_init_kwargs or {}),
    }
    training.trust_remote_code = False  # the installed zoo is what this command is for
    processor = AutoProcessor.from_pretrained(model.model_name_or_path, revision=model.model_revision)
    known = {entry.processor.__name__ for entry in ZOO.values()}
    if type(processor).__name__ not in known:
        raise ValueError(
            f"{model.model_name_or_path} opens as {type(processor).__name__}, which is none of the zoo's processors "
            f"({', '.join(sorted(known))}): for other models use `trl sft`."
        )
    trainer = LeanSFTTrainer(
        model=model.model_name_or_path,
        args=training,
        processing_class=processor,
        data_collator=ZooDataCollator(
            processor,
            max_length=training.max_length,
            pad_to_multiple_of=training.pad_to_multiple_of,
            dataset_text_field=training.dataset_text_field,
            completion_only_loss=training.completion_only_loss,
            assistant_only_loss=training.assistant_only_loss,
        ),
        train_dataset=data[script.dataset_train_split],
        eval_dataset=data[script.dataset_test_split] if training.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model(training.output_dir)
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
    return trainer


if __name__ == "__main__":
    main()
