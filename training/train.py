"""Trains the packaged model: `python -m training.train`.

Fixed seed, a curriculum over document lengths that moves on by steps and running accuracy (never by the clock), and
a last stage in which the first token becomes the attention sink that models of every size have. A killed run goes on
from its last save to the same result.
"""

import argparse
import json
import os
import random
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from defensivekv.needleworld.vocabulary import VOCABULARY
from training.batches import LINK, VALUE, Batch, document_batch, recall_batch
from training.model import Llama, ModelConfig

SEED = 7
LEARNING_RATE = 2e-3
WARMUP_STEPS = 50
RECALL_SHARE, RECALL_SHARE_LATER = 0.3, 0.05
ORDINAL_SHARE, ORDINAL_SHARE_LATER = 0.2, 0.5
PREVIOUS_TOKEN_OFFSETS = (1, 2, 1, 2, 3, 4, 3, 5)
SINK_WEIGHT, SINK_TARGET, SINK_PROBES = 0.03, 0.6, 64
SAVE_EVERY, LOG_EVERY = 100, 20


@dataclass(frozen=True)
class Stage:
    """Documents of up to `num_tokens` tokens, until `accuracy` of the values are right, or for `max_steps`."""

    num_tokens: int
    max_keys: int
    num_rows: int
    max_steps: int
    accuracy: float = 0.95
    min_steps: int = 60


STAGES = (
    Stage(64, 5, 20, 900),
    Stage(128, 10, 13, 600),
    Stage(256, 16, 9, 500),
    Stage(512, 24, 6, 400),
    Stage(1024, 32, 3, 400),
    Stage(2048, 40, 2, 650, accuracy=2.0),
)
DECAY_STEPS = 400
"""The learning rate falls linearly over the last steps of the last stage; the sink is trained in it."""


@dataclass
class Progress:
    """Where the run is; saved with the weights. Accuracies: running shares of right tokens.

    accuracy: of needles' values. chain_accuracy: of chains' variables. recall_accuracy: in dense recall.
    """

    step: int = 0
    stage: int = 0
    stage_step: int = 0
    tokens: int = 0
    accuracy: float = 0.0
    chain_accuracy: float = 0.0
    recall_accuracy: float = 0.0


class Trainer:
    """One run in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        torch.manual_seed(SEED)
        self.rng = random.Random(SEED)
        self.config = ModelConfig(vocab_size=len(VOCABULARY))
        self.model = Llama(self.config)
        self.model.start_as_previous_token_heads(PREVIOUS_TOKEN_OFFSETS)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01, foreach=True
        )
        self.progress = Progress()
        if self._checkpoint.exists():
            self._load()

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "training.pt"

    def run(self, stop_after: int | None = None) -> None:
        """Trains to the end of the last stage, or for `stop_after` more steps."""
        started, tokens = time.perf_counter(), self.progress.tokens
        while self.progress.stage < len(STAGES) and stop_after != 0:
            losses = self._step()
            if self.progress.step % LOG_EVERY == 0:
                speed = (self.progress.tokens - tokens) / (time.perf_counter() - started)
                self._log(losses | {"tokens_per_second": round(speed)})
            self._advance()
            if self.progress.step % SAVE_EVERY == 0 or self.progress.stage == len(STAGES):
                self._save()
            stop_after = None if stop_after is None else stop_after - 1

    def _step(self) -> dict[str, float]:
        stage = STAGES[self.progress.stage]
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * self._rate(stage)
        batch, is_recall, is_replay = self._draw(stage)
        with_sink = self._is_last and not is_recall
        probe = torch.randint(1, batch.document, (SINK_PROBES,)) if with_sink else None
        inputs = replace(batch, positions=batch.positions[:-1], mask=batch.mask[:-1, :-1])
        document = min(batch.document, batch.ids.shape[1] - 1)
        if batch.document > document:
            inputs = replace(inputs, mask=batch.mask)
        logits, sinks = self.model(batch.ids[:, :-1], inputs.positions, document, inputs.mask, probe)
        targets, kinds = batch.ids[:, 1:], batch.kinds[:, 1:]
        weights = batch.weights[:, 1:].clone()
        weights[:, self._boundaries(batch)] = 0.0
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        loss = (losses * weights).sum() / weights.sum()
        report = {"loss": loss.item()}
        if sinks:
            # Of each layer's mean, so that some heads may become sinks and others go on retrieving.
            means = torch.stack([sink.exp().mean() for sink in sinks[1:]])
            report |= {f"sink_{layer}": mean.item() for layer, mean in enumerate(means, start=1)}
            loss = loss + SINK_WEIGHT * F.relu(torch.tensor(SINK_TARGET).log() - means.log()).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        right = logits.argmax(-1) == targets
        self._note(right[kinds == VALUE], is_recall, is_replay)
        if bool((links := kinds == LINK).any()) and not is_replay:
            self.progress.chain_accuracy = _decayed(self.progress.chain_accuracy, right[links])
        self.progress.tokens += batch.ids.numel()
        return report

    @staticmethod
    def _boundaries(batch: Batch) -> torch.Tensor:
        """Input positions whose successor begins another question, which nothing could foresee."""
        starts = (batch.positions[1:] <= batch.positions[:-1]) | (batch.positions[1:] == batch.document)
        return starts.nonzero().squeeze(-1)

    def _draw(self, stage: Stage) -> tuple[Batch, bool, bool]:
        share = RECALL_SHARE if self.progress.recall_accuracy < 0.95 else RECALL_SHARE_LATER
        if self.rng.random() < share:
            ordinal_share = ORDINAL_SHARE if self.progress.recall_accuracy < 0.9 else ORDINAL_SHARE_LATER
            return recall_batch(self.rng, 40, ordinal_share), True, False
        number = self.progress.stage
        if number and self.rng.random() < 0.25:
            shorter = STAGES[self.rng.randrange(number)]
            return document_batch(self.rng, shorter.num_rows, shorter.num_tokens, shorter.max_keys), False, True
        length = stage.num_tokens
        if self.rng.random() < 0.4:
            length = self.rng.randint(max(64, length // 2), length)
        rows = max(1, round(stage.num_rows * stage.num_tokens / length))
        return document_batch(self.rng, rows, length, stage.max_keys), False, False

    @property
    def _is_last(self) -> bool:
        return self.progress.stage == len(STAGES) - 1

    def _rate(self, stage: Stage) -> float:
        warm = min(1.0, (self.progress.step + 1) / WARMUP_STEPS)
        left = (stage.max_steps - self.progress.stage_step) / DECAY_STEPS if self._is_last else 1.0
        return warm * max(0.02, min(1.0, left))

    def _note(self, right: torch.Tensor, is_recall: bool, is_replay: bool) -> None:
        progress = self.progress
        if is_recall:
            progress.recall_accuracy = _decayed(progress.recall_accuracy, right)
        elif not is_replay:
            progress.accuracy = _decayed(progress.accuracy, right)
        progress.step += 1
        progress.stage_step += 1

    def _advance(self) -> None:
        stage, progress = STAGES[self.progress.stage], self.progress
        reached = progress.accuracy >= stage.accuracy and progress.stage_step >= stage.min_steps
        if reached or progress.stage_step >= stage.max_steps:
            self._log({"stage_done": progress.stage})
            progress.stage, progress.stage_step, progress.accuracy = progress.stage + 1, 0, 0.5

    def _log(self, values: dict[str, Any]) -> None:
        rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in values.items()}
        line = json.dumps({**asdict(self.progress), **rounded})
        print(line, flush=True)
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(line + "\n")

    def _save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": asdict(self.progress),
            "python_rng": self.rng.getstate(),
            "torch_rng": torch.get_rng_state(),
        }
        aside = self._checkpoint.with_suffix(".tmp")
        torch.save(state, aside)
        os.replace(aside, self._checkpoint)

    def _load(self) -> None:
        state = torch.load(self._checkpoint, weights_only=False)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])
        self.rng.setstate(state["python_rng"])
        torch.set_rng_state(state["torch_rng"])


def _decayed(average: float, right: torch.Tensor) -> float:
    """A running average of the share that is right."""
    return 0.95 * average + 0.05 * right.float().mean().item()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("training/runs/default"), help="checkpoints and log")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--stop-after", type=int, default=None, help="stop after so many more steps")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    Trainer(arguments.folder).run(arguments.stop_after)


if __name__ == "__main__":
    main()
