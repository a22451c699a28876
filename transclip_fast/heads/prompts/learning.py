"""The training loop of the prompt learners."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from transclip_fast.data.labelled_rows import LabelledRows
from transclip_fast.errors import InputError
from transclip_fast.heads.base import Head, percent_right
from transclip_fast.heads.prompts.context import class_prompts
from transclip_fast.heads.task import HeadTask
from transclip_fast.heads.text_tower import Prompts
from transclip_fast.parallel import fixed_threads

MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
MOMENTUM_PREFIX = "momentum."  # before a parameter's name, in the checkpoint
# Numbers between two layers for all prompts; with fewer, threads wait more than they work.
SINGLE_THREAD_SIZE = 1 << 16


class Learner(torch.nn.Module, ABC):
    """
    A model that is trained on cached features through the text tower of the task's `prompting`.

    Its parameters are trained and checkpointed. They are on the tower's device, like the rows that
    it is called with.
    """

    def __init__(self, task: HeadTask) -> None:
        super().__init__()
        if task.prompting is None:
            raise InputError("prompts are learned through a text tower: give prompting")
        task.prompting.check(len(task.text))
        self.prompting, self.tower = task.prompting, task.prompting.tower
        self.settings, self.logit_scale = task.prompting.context, task.logit_scale

    @abstractmethod
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Logits (n, K) of unit rows (n, d), with gradients to the parameters."""

    @abstractmethod
    def head(self, *, words: bool = True) -> Head:
        """The head learned so far, on the CPU; without the nearest words unless `words`."""

    def class_prompts(self, n_ctx: int) -> Prompts:
        """The prompts of the classes with so many vectors of context."""
        names = self.prompting.class_names
        return class_prompts(self.tower, names, n_ctx, self.settings.position)

    def descend(self, rows: torch.Tensor, labels: torch.Tensor) -> float:
        """Set the gradients of the parameters for a batch (n, d), (n,); returns the loss."""
        loss = F.cross_entropy(self(rows), labels)
        torch.autograd.backward(loss)
        return float(loss.detach())

    def validate(self, rows: LabelledRows) -> float:
        """Accuracy on labelled rows, in percent."""
        return percent_right(self.head(words=False).logits(rows.features), rows.labels)


def train(learner: Learner, task: HeadTask) -> Head:
    """
    Train on the shots by stochastic gradient descent with momentum; returns the head.

    Batches are shuffled. The order of an epoch follows from the seed and the epoch's number, so the
    step count is the only random state of a checkpoint. The last bits depend on the number of
    threads, so a resumed training uses the number it started with. The progress is called with the
    loss at every step and with the validation accuracy after each epoch.

    Source: Zhou et al. 2022, section 4.1 and the authors' repository (KaiyangZhou/CoOp,
    configs/trainers/CoOp): SGD at 0.002, one epoch of warm-up at 1e-5, a cosine by epochs, batches
    of 32; momentum 0.9 and weight decay 5e-4 are the defaults of its toolbox, Dassl.
    """
    prompting = learner.prompting
    optimizer = torch.optim.SGD(
        learner.parameters(),
        lr=prompting.schedule.rate,
        momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
    )
    small = len(task.text) * prompting.tower.prompt_size < SINGLE_THREAD_SIZE
    done, threads = 0, 1 if small else torch.get_num_threads()
    state = prompting.checkpoint.load()
    if state is not None:
        done, threads = _restore(learner, optimizer, state)
    with fixed_threads(threads):
        _steps(learner, optimizer, task, done)
        return learner.head()


def _steps(learner: Learner, optimizer: torch.optim.Optimizer, task: HeadTask, done: int) -> None:
    """Train from step `done` to the end."""
    prompting, shots = learner.prompting, task.shots
    schedule, device = prompting.schedule, prompting.tower.device
    features, labels = shots.features.to(device), shots.labels.to(device)
    epochs = schedule.of(task.n_shots)
    rates = schedule.rates(epochs)
    size = schedule.batch_size
    batches = -(-len(shots) // size)
    steps, figures = epochs * batches, dict[str, str]()
    order = np.arange(0)
    for step in range(done, steps):
        epoch, batch = divmod(step, batches)
        if batch == 0 or step == done:
            order = np.random.default_rng([task.seed, epoch]).permutation(len(shots))
        rows = torch.from_numpy(order[batch * size : (batch + 1) * size]).to(device)
        optimizer.param_groups[0]["lr"] = rates[epoch]
        optimizer.zero_grad()
        loss = learner.descend(features[rows], labels[rows])
        if not math.isfinite(loss):
            raise InputError(f"the loss is {loss} after {step} steps; train with a lower rate")
        optimizer.step()
        figures["loss"] = f"{loss:.4f}"
        if task.validation is not None and batch + 1 == batches:
            figures["validation"] = f"{learner.validate(task.validation):.2f} %"
        task.progress(step + 1, steps, **figures)
        prompting.checkpoint.keep(partial(_state, learner, optimizer, step + 1))


def _state(learner: Learner, optimizer: torch.optim.Optimizer, done: int) -> dict[str, np.ndarray]:
    state = {"step": np.array(done), "threads": np.array(torch.get_num_threads())}
    for name, parameter in learner.named_parameters():
        momentum = optimizer.state[parameter]["momentum_buffer"]
        state[name] = parameter.detach().cpu().numpy()
        state[MOMENTUM_PREFIX + name] = momentum.cpu().numpy()
    return state


def _restore(
    learner: Learner, optimizer: torch.optim.Optimizer, state: Mapping[str, np.ndarray]
) -> tuple[int, int]:
    """Restore what `_state` has saved; returns the steps done and the number of threads."""
    with torch.no_grad():
        for name, parameter in learner.named_parameters():
            parameter.copy_(torch.from_numpy(state[name]))
            momentum = torch.from_numpy(state[MOMENTUM_PREFIX + name]).to(parameter)
            optimizer.state[parameter]["momentum_buffer"] = momentum
    return int(state["step"]), int(state["threads"])
