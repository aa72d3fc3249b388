"""Save a run, resume it in a fresh model, and compare the losses of both bit for bit.

    python examples/resume.py [--steps 30]

Bases and random streams are saved beside the model. A run without them trains on, too, but with
other noise.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from byte_transformer import ByteTransformer, training_data
from tabulate import tabulate
from torch import Tensor

import prac_fx


class Run:
    """A model in training, with all that belongs into its checkpoint."""

    def __init__(self, width: int, layers: int) -> None:
        self.model = ByteTransformer(width, layers)
        self.compiled = torch.compile(self.model, backend="prac")
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-3)

    def train(self, data: list[Tensor]) -> list[float]:
        """Train, and return the loss of each step."""
        losses = []
        for tokens in data:
            loss = self.compiled(tokens)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    def save(self, path: Path) -> None:
        """Save plain tensors, numbers and text."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save({**state, "prac": prac_fx.state_dict(self.model)}, path)

    def load(self, path: Path, with_ours: bool) -> None:
        """Load without running code from the file."""
        saved = torch.load(path, weights_only=True)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if with_ours:
            prac_fx.load_state_dict(self.model, saved["prac"])


def main(argv: Sequence[str] | None = None) -> None:
    """Train, save, and go on in three ways."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=30, help="before and after the checkpoint")
    for name, default in (("--width", 128), ("--layers", 2)):
        parser.add_argument(name, type=int, default=default)
    args = parser.parse_args(argv)
    data = training_data(2 * args.steps)
    before, after = data[: args.steps], data[args.steps :]
    run = Run(args.width, args.layers)
    run.train(before)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        run.save(path)
        losses = {"going on": run.train(after)}
        for name, with_ours in (("resumed", True), ("resumed without our state", False)):
            fresh = Run(args.width, args.layers)
            fresh.load(path, with_ours)
            losses[name] = fresh.train(after)
    rows = [
        [name, *run_losses[:3], run_losses == losses["going on"]]
        for name, run_losses in losses.items()
    ]
    print(tabulate(rows, ["", "loss", "", "", "bit for bit the same"], floatfmt=".9f"))


if __name__ == "__main__":
    main()
