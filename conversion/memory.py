"""What a conversion needs of memory: a synthetic Qwen2-VL of several gigabytes goes to the zoo and back.

    python -m conversion.memory                      4 GB in shards of 1 GB, safetensors
    python -m conversion.memory --gigabytes 8 --format bin

Each way runs in a process of its own, without the proof (which loads the model). Shown are its peak of anonymous
memory, that of mapped pages of files included, and the largest shard and tensor.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from . import engine


WIDTH, VOCABULARY, SHARD = 2048, 65536, 1.0
POLL_S = 0.005


def synthetic_config(gigabytes: float) -> Qwen2VLConfig:
    """A Qwen2-VL with as many layers as fill so many gigabytes in bfloat16."""
    layer = 2 * (2 * WIDTH * WIDTH + 2 * WIDTH * WIDTH // 4 + 3 * WIDTH * 4 * WIDTH)
    layers = max(1, round((gigabytes * 1e9 - 4 * VOCABULARY * WIDTH) / layer))
    return Qwen2VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_size": WIDTH,
            "intermediate_size": 4 * WIDTH,
            "num_hidden_layers": layers,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
            "tie_word_embeddings": False,
        },
        vision_config={"depth": 4, "embed_dim": 256, "hidden_size": WIDTH, "num_heads": 4},
        image_token_id=VOCABULARY - 1,
        video_token_id=VOCABULARY - 2,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["Qwen2VLForConditionalGeneration"],
    )


def write_synthetic(folder: Path, gigabytes: float, binary: bool) -> None:
    """Writes it shard by shard, as transformers 4 named its tensors."""
    config = synthetic_config(gigabytes)
    with torch.device("meta"):
        state = Qwen2VLForConditionalGeneration(config).state_dict()
    renames = ((r"^model\.visual\.(.+)$", r"visual.\1"), (r"^model\.language_model\.(.+)$", r"model.\1"), ("^", ""))
    shards, size = [[]], 0
    for name, tensor in state.items():
        if size + 2 * tensor.numel() > SHARD * 1e9:
            shards, size = [*shards, []], 0
        shards[-1].append(name)
        size += 2 * tensor.numel()
    weight_map, stem = {}, "pytorch_model" if binary else "model"
    for number, names in enumerate(shards, start=1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.{'bin' if binary else 'safetensors'}"
        part = {
            engine.rename(name, renames): torch.full(state[name].shape, number / 8, dtype=torch.bfloat16)
            for name in names
        }
        torch.save(part, folder / file) if binary else save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    config.save_pretrained(folder)
    index = f"{stem}.{'bin' if binary else 'safetensors'}.index.json"
    engine.write_json(folder / index, {"metadata": {}, "weight_map": weight_map})


def peaks_of(arguments: list[str]) -> dict[str, float]:
    """Runs a conversion and returns its peaks in gigabytes: `anonymous`, `resident`, and the `seconds` that it took.
    What Python and torch need before the first tensor is read is included."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "conversion.mrope", *arguments], stdout=subprocess.DEVNULL)
    found = {"anonymous": 0.0, "resident": 0.0}

    def watch() -> None:
        while process.poll() is None:
            try:
                lines = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii").splitlines()
            except OSError:
                return
            sizes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)
                     if name in ("RssAnon", "VmRSS")}  # fmt: skip
            found["anonymous"] = max(found["anonymous"], sizes.get("RssAnon", 0) * 1024 / 1e9)
            found["resident"] = max(found["resident"], sizes.get("VmRSS", 0) * 1024 / 1e9)
            time.sleep(POLL_S)

    watcher = threading.Thread(target=watch)
    watcher.start()
    watcher.join()
    if process.wait() != 0:
        raise engine.ConversionError(
            f"conversion.mrope {' '.join(arguments)} failed with status {process.returncode}."
        )
    return {**found, "seconds": time.perf_counter() - start}


def measure(gigabytes: float, binary: bool) -> dict:
    """Converts there and back, in a temporary folder."""
    with tempfile.TemporaryDirectory() as home:
        source, zoo, back = (Path(home) / name for name in ("source", "zoo", "back"))
        source.mkdir()
        write_synthetic(source, gigabytes, binary)
        tensors = engine.read_checkpoint(source)
        files = {info.file for info in tensors.values()}
        found = {
            "checkpoint": sum(info.nbytes for info in tensors.values()) / 1e9,
            "largest shard": max(file.stat().st_size for file in files) / 1e9,
            "largest tensor": max(info.nbytes for info in tensors.values()) / 1e9,
            "at rest": peaks_of([str(source), "--dry-run"]),
        }
        there = [str(source), str(zoo), "--no-verify", "--shard-size", str(SHARD)]
        found["there"] = peaks_of(there)
        found["back"] = peaks_of([str(zoo), str(back), "--reverse", "--no-verify"])
        return found


def main(arguments: list[str] | None = None) -> int:
    """Prints what was measured as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m conversion.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=4.0, help="default: %(default)s")
    parser.add_argument("--format", choices=("safetensors", "bin"), default="safetensors", help="of the source")
    options = parser.parse_args(arguments)
    print(json.dumps(measure(options.gigabytes, options.format == "bin"), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
