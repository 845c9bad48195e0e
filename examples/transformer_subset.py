"""Which tokens of a sequence decide? A small transformer reads only the tokens at the bound.

Sequences of different lengths hold digits among letters; the label says whether the digits' average exceeds 4.5.
Padding is masked: it is never selected and gets no gradient.

    python examples/transformer_subset.py [--steps 1500]
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional

from bla.operators import BoundedLogits, normalised

DIGITS, LETTERS, LONGEST = 10, 26, 16
PRICE = 0.02


def draw(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (n, 16), which of them are real (n, 16), labels (n,)."""
    length = torch.randint(6, LONGEST + 1, (n, 1), generator=generator)
    real = torch.arange(LONGEST) < length
    digit = torch.rand(n, LONGEST, generator=generator) < 0.25
    digit[:, 0] = True
    values = torch.randint(DIGITS, (n, LONGEST), generator=generator)
    letters = DIGITS + torch.randint(LETTERS, (n, LONGEST), generator=generator)
    average = (values * (digit & real)).sum(dim=1) / (digit & real).sum(dim=1)
    return torch.where(digit, values, letters), real, (average > 4.5).float()


class Reader(nn.Module):
    """Scores from a transformer layer over all tokens; the label from the embeddings of those selected."""

    def __init__(self, operator: BoundedLogits) -> None:
        super().__init__()
        self.operator = operator
        self.embedding = nn.Embedding(DIGITS + LETTERS, 32)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.score = nn.Linear(32, 1)
        self.head = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
        nn.init.constant_(self.score.bias, 2.0)  # everything starts within the subset

    def forward(self, tokens: Tensor, real: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (B,), memberships (B, N), expected sizes (B,)."""
        embedded = self.embedding(tokens)
        scores = self.score(self.layer(embedded, src_key_padding_mask=~real))[..., 0]
        select = self.operator.soft(scores, real, generator) if self.training else self.operator.hard(scores, real)
        pooled = (normalised(select)[..., None] * embedded).sum(dim=1)
        return self.head(pooled)[:, 0], select, self.operator.expected_size(scores, real)


def main() -> None:
    """Train, then print what is selected."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    reader = Reader(BoundedLogits(noise=1.0)).train()
    optimiser = torch.optim.Adam(reader.parameters(), 2e-3)
    for step in range(steps):
        tokens, real, labels = draw(128, generator)
        logits, _, size = reader(tokens, real, generator)
        price = PRICE * min(1, 2 * step / steps) * size.mean()
        optimiser.zero_grad()
        (functional.binary_cross_entropy_with_logits(logits, labels) + price).backward()
        optimiser.step()
    reader.eval()
    tokens, real, labels = draw(2000, generator)
    with torch.no_grad():
        logits, selected, _ = reader(tokens, real, None)
    chosen, digits = selected.bool(), (tokens < DIGITS) & real
    print(f"accuracy from the selected tokens alone: {((logits > 0) == (labels > 0)).double().mean():.3f}")
    print(f"selected {chosen.sum(dim=1).double().mean():.1f} of {real.sum(dim=1).double().mean():.1f} tokens; "
          f"digits among them {(chosen & digits).sum() / chosen.sum():.3f}, "
          f"of all digits {(chosen & digits).sum() / digits.sum():.3f}")  # fmt: skip
    for row in range(3):
        signs = [str(token) if token < DIGITS else chr(ord("a") + token - DIGITS) for token in tokens[row].tolist()]
        shown = zip(signs, chosen[row].tolist(), real[row].tolist(), strict=True)
        print(" ".join(f"[{sign}]" if picked else f" {sign} " for sign, picked, there in shown if there))


if __name__ == "__main__":
    main()
