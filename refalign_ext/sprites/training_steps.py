"""The one loop in which the embedded model's smaller parts train: VAE, text encoder and teachers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer


def train_steps(
    parameters: Iterable[Tensor],
    optimizers: Sequence[Optimizer],
    loss_of: Callable[[int], Tensor],
    *,
    steps: int,
    first: int = 0,
    warmup: int,
    decay: float,
    least: float,
    report_every: int,
    report: Callable[[int, float], None],
    label: str,
) -> None:
    """Train to `steps`: linear warm-up of the optimizers' own rates, then linear decay.

    Args:
        parameters: those that the optimizers share out; their gradient's norm is kept to 1.
        loss_of: step -> loss.
        first: the first step, of a run that goes on.
        warmup, decay, least: steps of warm-up, the last share of all steps in which rates fall, and to what share.
        report: called with the number of steps done and the loss, every `report_every` steps and at the end.
    """
    from tqdm import tqdm

    groups = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    parameters = list(parameters)
    for step in tqdm(range(first, steps), initial=first, total=steps, desc=label, mininterval=2):
        for group, rate in groups:
            fall = max(least, min(1.0, (1 - step / steps) / decay))
            group["lr"] = rate * min(1.0, (step + 1) / warmup) * fall
        loss = loss_of(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if (step + 1) % report_every == 0 or step + 1 == steps:
            report(step + 1, loss.item())
