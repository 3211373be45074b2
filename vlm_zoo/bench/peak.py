"""One step of one row in a fresh process: prints the bytes that it adds at its peak.

python -m vlm_zoo.bench.peak loss_152k ours full cpu
"""

import dataclasses
import json
import sys

from .engine import SCALES, find_rows
from .measure import one_thread, peak_of


def main(row: str, step: str, scale: str, device: str) -> None:
    """Builds the row, runs its step `ours`, `peer` or `limit` once and writes `{"peak": bytes}`."""
    with one_thread():
        case = find_rows([row])[0].build(dataclasses.replace(SCALES[scale], device=device))
        sys.stdout.write(json.dumps({"peak": peak_of(case.steps()[step], device)}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
