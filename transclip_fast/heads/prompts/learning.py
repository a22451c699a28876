"""What every prompt learner is given, and how it is trained."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from transclip_fast.callbacks import Checkpoint, NoCheckpoint
from transclip_fast.errors import InputError
from transclip_fast.heads.prompts.context import ContextSettings
from transclip_fast.heads.prompts.tower import TextTower
from transclip_fast.heads.task import Head, Labelled, Task, percent_right
from transclip_fast.parallel import fixed_threads

WARM_UP, WARM_UP_RATE = 1, 1e-5  # epochs
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
EPOCHS = ((1, 50), (4, 100), (math.inf, 200))  # up to so many shots so many epochs
MOMENTUM_OF = "momentum."
SMALL = 1 << 16  # numbers between two layers; with fewer, threads wait more than they work


@dataclass(frozen=True)
class Schedule:
    """
    How long and how fast is trained.

    Parameters
    ----------
    epochs : int, optional
        50 with one shot, 100 with up to four, 200 beyond, where not given.
    batch_size : int
    rate : float
        Of the gradient descent after the first epoch, at the start of its cosine.
    """

    epochs: int | None = None
    batch_size: int = 32
    rate: float = 2e-3

    def of(self, shots: int) -> int:
        """Epochs for so many shots a class."""
        return self.epochs or next(n for most, n in EPOCHS if shots <= most)

    def rates(self, epochs: int) -> list[float]:
        """The rate of each epoch: one of warm-up, then a cosine towards zero."""
        cosine = [self.rate * (1 + math.cos(math.pi * e / epochs)) / 2 for e in range(epochs)]
        return [WARM_UP_RATE] * min(WARM_UP, epochs) + cosine[WARM_UP:]


@dataclass(frozen=True)
class Prompting:
    """
    What the prompt learners need beside a `Task`.

    Parameters
    ----------
    tower : TextTower
    class_names : sequence of str
        In the order of the labels.
    context : ContextSettings
    schedule : Schedule
    checkpoint : Checkpoint
        Where a training is kept, so that a killed one goes on.
    """

    tower: TextTower
    class_names: Sequence[str]
    context: ContextSettings = field(default_factory=ContextSettings)
    schedule: Schedule = field(default_factory=Schedule)
    checkpoint: Checkpoint = field(default_factory=NoCheckpoint)


class Learner(torch.nn.Module, ABC):
    """
    Something that is trained on cached features through a text tower.

    Its parameters are what is trained and kept; they live on the tower's device, like the rows that
    it is given.
    """

    @abstractmethod
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Logits (n, K) of unit rows (n, d), with gradients to the parameters."""

    @abstractmethod
    def head(self) -> Head:
        """What has been learned so far, on the CPU."""

    def descend(self, rows: torch.Tensor, labels: torch.Tensor) -> float:
        """Leave the gradients of a batch (n, d), (n,) in the parameters; its loss."""
        loss = F.cross_entropy(self(rows), labels)
        torch.autograd.backward(loss)
        return float(loss.detach())

    def validate(self, rows: Labelled) -> float:
        """Accuracy on labelled rows, in percent."""
        return percent_right(self.head().logits(rows.features), rows.labels)


def prompting_of(task: Task) -> Prompting:
    """
    What a task says of prompts.

    Raises
    ------
    InputError
        Nothing, another number of names than of classes, or settings that make no sense.
    """
    if task.prompting is None:
        raise InputError("prompts are learned through a text tower: give prompting")
    names, n_classes = task.prompting.class_names, len(task.text)
    if len(names) != n_classes:
        raise InputError(f"class_names: {len(names)} names for {n_classes} classes")
    task.prompting.context.check()
    return task.prompting


def train(learner: Learner, task: Task) -> Head:
    """
    Train on the shots by stochastic gradient descent with momentum; the head at the end.

    Batches are shuffled; the order of an epoch follows from the seed and its number, so that the
    steps done are all the random state there is. Last bits follow from the number of threads, which
    a training that goes on therefore keeps. The task's progress is told the steps, the loss and,
    after each epoch, the accuracy on the validation set.

    Source: Zhou et al. 2022, section 4.1 and the authors' repository (KaiyangZhou/CoOp,
    configs/trainers/CoOp): SGD at 0.002, one epoch of warm-up at 1e-5, a cosine by epochs, batches
    of 32; momentum 0.9 and weight decay 5e-4 are the defaults of its toolbox, Dassl.

    Raises
    ------
    InputError
        The loss is no number any more.
    """
    prompting = prompting_of(task)
    rate = prompting.schedule.rate
    optimizer = torch.optim.SGD(
        learner.parameters(), lr=rate, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
    )
    small = len(task.text) * prompting.tower.prompt_size < SMALL
    done, threads = 0, 1 if small else torch.get_num_threads()
    kept = prompting.checkpoint.load()
    if kept is not None:
        done, threads = _restore(learner, optimizer, kept)
    with fixed_threads(threads):
        _descend(learner, optimizer, task, prompting, done)
        return learner.head()


def _descend(
    learner: Learner,
    optimizer: torch.optim.Optimizer,
    task: Task,
    prompting: Prompting,
    done: int,
) -> None:
    """The steps from `done` on."""
    schedule, device, shots = prompting.schedule, prompting.tower.device, task.shots
    features, labels = shots.features.to(device), shots.labels.to(device)
    epochs = schedule.of(task.n_shots)
    rates = schedule.rates(epochs)
    batches = -(-len(shots) // schedule.batch_size)
    steps, figures = epochs * batches, dict[str, str]()
    for step, rows in _batches(len(shots), schedule.batch_size, task.seed, done, steps):
        optimizer.param_groups[0]["lr"] = rates[step // batches]
        optimizer.zero_grad()
        rows = rows.to(device)
        loss = learner.descend(features[rows], labels[rows])
        if not math.isfinite(loss):
            raise InputError(f"the loss is {loss} after {step} steps; train with a lower rate")
        optimizer.step()
        figures["loss"] = f"{loss:.4f}"
        if task.validation is not None and (step + 1) % batches == 0:
            figures["validation"] = f"{learner.validate(task.validation):.2f} %"
        task.progress(step + 1, steps, **figures)
        prompting.checkpoint.keep(partial(_state, learner, optimizer, step + 1))


def _batches(
    number: int, size: int, seed: int, done: int, steps: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """Steps from `done` on, each with the rows of its batch."""
    batches = -(-number // size)
    order = np.arange(0)
    for step in range(done, steps):
        epoch, batch = divmod(step, batches)
        if batch == 0 or step == done:
            order = np.random.default_rng([seed, epoch]).permutation(number)
        yield step, torch.from_numpy(order[batch * size : (batch + 1) * size])


def _state(learner: Learner, optimizer: torch.optim.Optimizer, done: int) -> dict[str, np.ndarray]:
    state = {"step": np.array(done), "threads": np.array(torch.get_num_threads())}
    for name, parameter in learner.named_parameters():
        state[name] = parameter.detach().cpu().numpy()
        state[MOMENTUM_OF + name] = optimizer.state[parameter]["momentum_buffer"].cpu().numpy()
    return state


def _restore(
    learner: Learner, optimizer: torch.optim.Optimizer, state: Mapping[str, np.ndarray]
) -> tuple[int, int]:
    """Put back what `_state` kept; the steps done, and the threads that did them."""
    with torch.no_grad():
        for name, parameter in learner.named_parameters():
            parameter.copy_(torch.from_numpy(state[name]))
            momentum = torch.from_numpy(state[MOMENTUM_OF + name]).to(parameter)
            optimizer.state[parameter]["momentum_buffer"] = momentum
    return int(state["step"]), int(state["threads"])
