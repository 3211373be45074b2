"""Asks a model a question about an image.

    python examples/ask.py runs/demo/instruction page.png "What is in the top left?"

The folder is opened by the installed zoo. Without the zoo,
`transformers.AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)` opens the same folder.
"""

import argparse
import sys

from PIL import Image
from transformers import AutoProcessor

from vlm_zoo import AutoModelForVision2Seq
from vlm_zoo.evaluation.answering import answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("image", help="file")
    parser.add_argument("question")
    options = parser.parse_args()
    model = AutoModelForVision2Seq.from_pretrained(options.model)
    processor = AutoProcessor.from_pretrained(options.model)
    row = {
        "images": [Image.open(options.image)],
        "messages": [{"role": "user", "content": options.question}],
    }
    sys.stdout.write(answer(model, processor, [row])[0] + "\n")


if __name__ == "__main__":
    main()
