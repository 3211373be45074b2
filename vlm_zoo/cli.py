"""The command line: `vlm-zoo demo | build | sft | dpo | check | explain | bench`."""

import argparse
import json
import logging
import subprocess
import sys

import yaml


def main(arguments: list[str] | None = None) -> int:
    """
    Runs one command; `arguments` replace those of the command line.

    Returns:
        0, or 1 when the command could not do what was asked (the reason is on standard error).
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("httpx", "matplotlib", "datasets"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    command = arguments[0] if arguments else ""
    try:
        if command in ("sft", "dpo"):  # their options are TRL's
            return _train(command, arguments[1:])
        options = _parser().parse_args(arguments)
        return options.run(options) or 0
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        logging.getLogger(__name__).error("vlm-zoo %s: %s", command, error)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vlm-zoo", description="Vision-language models from their parts to answers.")
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="build, train, save, reload and question a small model; write a report")
    demo.add_argument("--out", default="runs/demo", help="folder of the run (default: %(default)s)")
    demo.add_argument("--arch", default="llava", help="architecture (default: %(default)s)")
    demo.add_argument("--fast", action="store_true", help="tiles alone, in under three minutes")
    demo.set_defaults(run=_demo)

    build = commands.add_parser("build", help="join a vision tower and a language model")
    build.add_argument("--arch", default="llava", help="architecture (default: %(default)s)")
    build.add_argument("--vision", required=True, help="folder or Hub id of the tower")
    build.add_argument("--language", required=True, help="folder or Hub id of the language model")
    build.add_argument("--out", required=True, help="folder to write")
    build.add_argument("--chat-template", help="file with a chat template, instead of the language model's own")
    build.add_argument("--image-token", default="<image>", help="text of the placeholder (default: %(default)s)")
    build.add_argument("--dtype", help="float32, bfloat16 or float16 (default: the language model's)")
    build.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="a field of the config, as YAML"
    )
    build.add_argument("--overwrite", action="store_true", help="replace what --out holds")
    build.add_argument("--trust-remote-code", action="store_true", help="run code that the parts bring along")
    build.set_defaults(run=_build)

    check = commands.add_parser("check", help="run the contract on a folder and print the table")
    check.add_argument("model", help="folder or Hub id")
    check.add_argument("--only", help="promises that contain this text")
    check.add_argument("--trust-remote-code", action="store_true", help="run code that the folder brings along")
    check.set_defaults(run=_check)

    explain = commands.add_parser("explain", help="draw over a picture where a model looks when it answers")
    explain.add_argument("model", help="folder or Hub id")
    explain.add_argument("image", help="file or URL of the picture")
    explain.add_argument("question", help="what to ask about it")
    explain.add_argument("--out", default="map.png", help="PNG to write (default: %(default)s)")
    explain.add_argument("--answer", help="explain this answer, instead of the model's own")
    explain.add_argument("--trust-remote-code", action="store_true", help="run code that the folder brings along")
    explain.set_defaults(run=_explain)

    bench = commands.add_parser("bench", help="ratios against transformers' own classes, on the same weights")
    bench.add_argument("--quick", action="store_true", help="fewer rounds and smaller sizes")
    bench.add_argument("--only", help="comma-separated names of rows")
    bench.add_argument("--json", metavar="FILE", help="write the table to a file as well")
    bench.set_defaults(run=_bench)

    commands.add_parser("sft", help="`trl sft` without remote code; options and YAML keys are TRL's", add_help=False)
    commands.add_parser("dpo", help="`trl dpo` without remote code; options and YAML keys are TRL's", add_help=False)
    return parser


def _demo(options: argparse.Namespace) -> None:
    from .demo import run

    report = run(options.out, options.arch, fast=options.fast)
    logging.getLogger(__name__).info(
        "accuracy %.3f, blind %.3f, on an artist not in training %.3f; %.0f s; %s/report.html",
        report["accuracy"],
        report["blind_accuracy"],
        report["new_artist_accuracy"],
        report["seconds"],
        options.out,
    )


def _build(options: argparse.Namespace) -> None:
    from .building import build

    fields = dict(item.split("=", 1) for item in options.set if "=" in item)
    if len(fields) != len(options.set):
        raise ValueError(f"--set takes FIELD=VALUE, got {' '.join(options.set)}.")
    build(
        options.arch,
        options.vision,
        options.language,
        options.out,
        chat_template=options.chat_template,
        image_token=options.image_token,
        dtype=options.dtype,
        overwrite=options.overwrite,
        trust_remote_code=options.trust_remote_code,
        **{name: yaml.safe_load(value) for name, value in fields.items()},
    )


def _check(options: argparse.Namespace) -> int:
    from transformers import AutoProcessor

    from .registry import AutoModelForVision2Seq
    from .testing import check_vlm

    trust = {"trust_remote_code": True} if options.trust_remote_code else {}
    model = AutoModelForVision2Seq.from_pretrained(options.model, dtype="float32", **trust).eval()
    report = check_vlm(model, AutoProcessor.from_pretrained(options.model, **trust), only=options.only)
    sys.stdout.write(f"{report}\n")
    return 1 if report.broken else 0


def _explain(options: argparse.Namespace) -> None:
    import torch
    from transformers import AutoProcessor

    from .explain import explain
    from .registry import AutoModelForVision2Seq

    trust = {"trust_remote_code": True} if options.trust_remote_code else {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForVision2Seq.from_pretrained(options.model, dtype="auto", **trust).to(device)
    processor = AutoProcessor.from_pretrained(options.model, **trust)
    found = explain(model, processor, options.image, options.question, answer=options.answer, out=options.out)
    sys.stdout.write(f"{found.answer}\n")
    logging.getLogger(__name__).info("%s: %s", options.out, ", ".join(found.maps))


def _bench(options: argparse.Namespace) -> int:
    from .bench import run, table

    rows = run(quick=options.quick, only=options.only.split(",") if options.only else None)
    sys.stdout.write(f"{table(rows)}\n")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump([row.to_dict() for row in rows], file, indent=1)
    return 1 if any(row.invalid for row in rows) else 0


def _train(command: str, arguments: list[str]) -> int:
    from .training import dpo, sft

    {"sft": sft, "dpo": dpo}[command].main(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
