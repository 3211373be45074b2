"""ARR-COC's toy: can the scorers learn where to look from the answer's loss alone?

    python examples/arr_coc_toy.py                          # about five minutes on two CPU cores, all rows
    python examples/arr_coc_toy.py --gates noise none --seeds 1

A picture of 12 x 12 cells has nine regions of 4 x 4. Every region carries a marker, which survives pooling, and one of
four patterns, whose mean is zero, so that only native tokens show it. The question names a marker; the answer is the
pattern of its region, and the budget lets exactly one region be native. Relevance, allocation, pooling and gates are
those of the model (`ZooArrCocModel.compress`); in place of tower and language model there are vectors and one
attention that reads normalised tokens.

Printed for every gate and seed: held-out accuracy (chance 0.25), and how often the named region was native (chance
0.11). "random" gives detail to regions by chance; "none" is a hard choice without a gradient.
"""

import argparse
import sys

import torch
from torch import nn

from vlm_zoo.models.arr_coc import Question, ZooArrCocModel
from vlm_zoo.testing import tiny_config


REGIONS, SIDE, PATTERNS = 9, 4, 4
SIZE = (3 * SIDE, 3 * SIDE)
BUDGET = REGIONS - 1 + SIDE * SIDE
STATISTICS = 17  # of the texture of each cell: there is none
ROWS = ("noise", "attn_bias", "multiply", "crossfade", "none", "random")


class Toy(nn.Module):
    """Pictures, and a reader of what is left of them."""

    def __init__(self, gate: str, steps: int):
        super().__init__()
        config = tiny_config(
            "arr_coc",
            token_budget=BUDGET,
            ladder=[1, SIDE],
            coarse_share=1.0,
            allocation="random" if gate == "random" else "relevance",
            gate="none" if gate == "random" else gate,
            exploration_steps=max(1, round(0.7 * steps)),
            weighted_pooling=False,  # unequal weights would let the pattern through
            fixed_tensions=[0.0, 0.5, 0.5],
            scorers=["participatory"],
        )
        self.model = ZooArrCocModel(config)
        width = config.text_config.hidden_size
        self.register_buffer("markers", torch.randn(REGIONS, width))
        self.register_buffer("patterns", torch.randn(PATTERNS, width))
        signs = torch.ones(SIDE * SIDE)
        signs[::2] = -1
        self.register_buffer("signs", signs)
        self.norm = nn.RMSNorm(width)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value = nn.Sequential(nn.Linear(width, 128), nn.GELU())
        self.answer = nn.Linear(128, PATTERNS)

    def pictures(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pictures `float[G, N, C]`, the marker that is asked for, its region, and its pattern, `int[G]` each."""
        marker = torch.rand(count, REGIONS).argsort(1)
        pattern = torch.randint(PATTERNS, (count, REGIONS))
        detail = self.signs[:, None] * self.patterns[pattern][:, :, None]  # [G, R, cells, C]
        cells = self.markers[marker][:, :, None] + detail
        grid = cells.unflatten(1, (3, 3)).unflatten(3, (SIDE, SIDE)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        region = torch.randint(REGIONS, (count,))
        rows = torch.arange(count)
        native = nn.functional.pad(grid.flatten(1, 2), (0, STATISTICS))
        return native, marker[rows, region], region, pattern[rows, region]

    def forward(self, native: torch.Tensor, marker: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores of the patterns `float[G, 4]`, and the level of every region `int[G, R]`."""
        asked = torch.ones(len(marker), 1, dtype=torch.bool)
        question = self.markers[marker][:, None]
        kept = self.model.compress(native, SIZE, BUDGET, Question(question, asked))
        self.model.fusion.forwards += int(self.model.learns_relevance)
        tokens = self.norm(kept.tokens)
        scores = (self.query(question) @ self.key(tokens).transpose(1, 2))[:, 0] * tokens.shape[-1] ** -0.5
        weights = (scores + kept.log_membership).softmax(dim=-1)
        read = (weights[:, None] @ self.value(tokens))[:, 0]
        return self.answer(read), torch.stack([report.levels.flatten() for report in kept.reports])


def run(gate: str, seed: int, steps: int, batch_size: int = 64) -> tuple[float, float]:
    """Trains and tests one toy: its accuracy, and the share of named regions that were native."""
    torch.manual_seed(seed)
    toy = Toy(gate, steps)
    optimizer = torch.optim.AdamW([p for p in toy.parameters() if p.requires_grad], lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.05)
    toy.train()
    for _ in range(steps):
        native, marker, _, pattern = toy.pictures(batch_size)
        loss = nn.functional.cross_entropy(toy(native, marker)[0], pattern)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    toy.eval()
    with torch.no_grad():
        native, marker, region, pattern = toy.pictures(512)
        scores, levels = toy(native, marker)
    found = levels[torch.arange(len(region)), region] == 1
    return (scores.argmax(1) == pattern).float().mean().item(), found.float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gates", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    options = parser.parse_args()
    for gate in options.gates:
        results = [run(gate, seed, options.steps) for seed in range(options.seeds)]
        accuracy, native = (" ".join(f"{value:.2f}" for value in values) for values in zip(*results, strict=True))
        sys.stdout.write(f"{gate:10} accuracy {accuracy}   named region native {native}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
