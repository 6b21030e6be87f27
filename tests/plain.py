"""Training as one would write it without this project: one process, the whole batch at once, ordinary PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ray_dnn.config import Loss
from ray_dnn.engine import codec, numerics
from ray_dnn.engine.rng import seed_everything
from tests.local import Make


def train(make: Make) -> bytes:
    """Train a job's model on its rows in its order. Returns ``tensors``, and ``losses`` by step, as an encoded tree."""
    job = make()
    spec, config = job.spec, job.config
    numerics.enforce(config)
    seed_everything("model", config.seed)
    model = spec.model()
    made = spec.optimizer(model)
    optimizers = made if isinstance(made, dict) else {"optimizer": made}
    losses = spec.loss if isinstance(spec.loss, dict) else {"optimizer": spec.loss}
    schedulers = [spec.scheduler(optimizer) for optimizer in optimizers.values()] if spec.scheduler else []
    extra = spec.extra_state(model) if spec.extra_state else {}
    history = []
    steps = job.schedule.total_steps if spec.stop is None else 3 * config.evaluate_every
    for step in range(steps):
        (batch,) = job.schedule.batches(step)
        data = spec.collate(job.rows.take(job.order.at(*batch)), torch.Generator())
        history.append({key: update(model, optimizers[key], losses[key], data, config.clip_norm) for key in losses})
        for scheduler in schedulers:
            scheduler.step()
        if spec.after_update:
            with torch.no_grad():
                spec.after_update(model, extra, step)
    tensors = {name: tensor.detach() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    return codec.encode({"tensors": tensors, "losses": history})


def update(model: nn.Module, optimizer: Any, loss: Any, data: Any, clip_norm: float | None) -> float:
    """One update, left out where the gradient is not finite. Returns the loss before it."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.zero_grad()
    value = loss(model, data)
    if isinstance(value, Loss):
        value = value.total / value.weight
    value.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if all(p.grad is None or p.grad.isfinite().all() for p in parameters):
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, clip_norm)
        optimizer.step()
    else:
        model.load_state_dict(before, strict=False)
    return value.item()
