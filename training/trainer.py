"""One training step, the state that a checkpoint holds, and the loop over an epoch."""

import contextlib
import dataclasses
import math
import os
import signal
import time

import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch.nn.parallel import DistributedDataParallel

from data import flip_batch, preprocess
from model import EXTRAS, build_model, extra_loss, load_weights
from training.augment import augment, draw, is_on
from training.loss import parse_family_weights, sample_losses
from training.optim import Schedule, build_optimizer
from utils import AUTOCAST, averaged_weights, load_checkpoint, pick_precision, write_atomic

PROGRESS = ("step", "validated", "best_mae", "since_best")


def flatten(tensors):
    """All values in one vector; None of no tensors."""
    return torch.cat([t.flatten() for t in tensors]) if tensors else None


class Trainer:
    """Network, its average, optimizer, schedule and scaler: all that a checkpoint holds."""

    def __init__(self, cfg, process, steps_per_epoch, network=None):
        self.cfg, self.process = cfg, process
        self.step, self.validated, self.best_mae, self.since_best = 0, 0, math.inf, 0
        self.saved_s = time.monotonic()
        self.steps_per_epoch, self.n_steps = steps_per_epoch, cfg.epochs * steps_per_epoch
        self.global_batch = cfg.batch_size * cfg.accumulate * process.world
        self.precision = pick_precision(cfg.precision, process.device)
        self.dtype = AUTOCAST.get(self.precision)
        self.family_weights = parse_family_weights(cfg.family_weights).to(process.device)
        self.network = (network or build_model(cfg)).to(process.device)
        if cfg.ckpt:
            load_weights(self.network, averaged_weights(load_checkpoint(cfg.ckpt)), cfg.ckpt)
        self.buffers = [b for b in self.network.buffers() if b.is_floating_point()]
        # the average stays in float32 and carries buffers; made before DDP and compilation rename anything
        self.ema = ModelEmaV3(self.network, decay=cfg.ema_decay, use_warmup=True)
        self.optimizer = build_optimizer(self.network, cfg)
        self.schedule = Schedule(self.optimizer, cfg, self.n_steps, steps_per_epoch)
        # float16 needs the scale; every precision needs the skipping of non-finite steps, at scale 1
        scale = {} if self.dtype is torch.float16 else {"init_scale": 1.0}
        self.scaler = torch.amp.GradScaler(process.device.type, **scale)
        self.forward, self.no_sync = self.network, contextlib.nullcontext
        self.online = None  # online.Online, while training with simulated samples
        if process.world > 1:
            ids = [process.device] if process.device.type == "cuda" else None
            self.forward = DistributedDataParallel(self.network, device_ids=ids)
            self.no_sync = self.forward.no_sync
        if cfg.compile != "off":
            self.forward = torch.compile(self.forward, mode=cfg.compile)

    def autocast(self):
        return torch.autocast(self.process.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def losses(self, forward, seis, vel, family):
        """Loss and absolute error of each sample, (B,) m/s each."""
        wants_extras = any(getattr(self.cfg, name) for name in EXTRAS)
        with self.autocast():
            prediction, extras = forward(seis, extras=True) if wants_extras else (forward(seis), {})
        losses = sample_losses(prediction, vel, family, self.cfg, self.family_weights)
        if extras:
            losses = losses + extra_loss(extras, prediction, vel, family)
        return losses, (prediction.detach() - vel).abs().mean((1, 2, 3))

    def train_step(self, batches):
        """One update from `accumulate` batches: (losses of its samples, MAE, gradient norm), on device."""
        self.forward.train()
        statistics = flatten(self.buffers)
        all_losses, errors = [], []
        for m, batch in enumerate(batches):
            with contextlib.nullcontext() if m == len(batches) - 1 else self.no_sync():
                losses, error = self.losses(self.forward, *batch)
                loss = losses.mean() / len(batches)
                # a loss that is not finite must reach the gradient, which all ranks share: all skip alike
                loss = loss * torch.where(loss.isfinite(), 1.0, math.nan)
                self.scaler.scale(loss).backward()
            all_losses.append(losses.detach())
            errors.append(error)
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients) / self.scaler.scale(torch.ones_like(loss))
        # clips: the optimizer divides by it and by the loss scale as it reads the gradients, once for all
        self.optimizer.grad_scale = (norm / (self.cfg.clip_norm or math.inf)).clamp(min=1)
        self.scaler.step(self.optimizer)
        self.share_statistics(statistics, norm.isfinite())
        self.scaler.update(None if self.dtype is torch.float16 else 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.ema.update(self.network, step=self.step)
        self.schedule.set(self.step)
        return torch.cat(all_losses), torch.cat(errors).mean(), norm

    def share_statistics(self, before, keep):
        """Batch norm's statistics: the mean of all ranks', or those `before` where a step is left out."""
        if self.buffers:
            mean = self.process.sum(flatten(self.buffers)) / self.process.world
            pieces = torch.where(keep, mean, before).split([b.numel() for b in self.buffers])
            torch._foreach_copy_(
                self.buffers, [p.view_as(b) for p, b in zip(pieces, self.buffers, strict=True)]
            )

    def prepare(self, micro, seis, vel, family):
        """A batch on the device, augmented; the draws depend on seed, step and place in the global batch."""
        cfg, process = self.cfg, self.process
        seis, vel, family = (t.to(process.device, non_blocking=True) for t in (seis, vel, family))
        shape, mine = (cfg.accumulate, process.world, len(seis)), (micro, process.rank)
        generator = torch.Generator().manual_seed(self.step_seed())
        seis, vel = flip_batch(seis, vel, torch.rand(shape, generator=generator)[mine] < cfg.flip_p)
        if self.online is not None:  # these come with exact mirror images instead
            first = (micro * process.world + process.rank) * len(seis)
            self.online.mix(self.step, first, seis, vel, family)
        if is_on(cfg):
            seis, vel = augment(seis, vel, cfg, *(drawn[mine] for drawn in draw(shape, generator)))
        return preprocess(seis, cfg.mode), vel, family

    def step_seed(self):
        return self.cfg.seed + 1_000_003 * self.step

    def state(self):
        return {
            "model": self.network.state_dict(),
            "ema": self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": {name: getattr(self, name) for name in PROGRESS},
            "global_batch": self.global_batch,
            "cfg": dataclasses.asdict(self.cfg),
        }

    def restore(self, state):
        load_weights(self.network, state["model"])
        load_weights(self.ema.module, state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        for name in PROGRESS:
            setattr(self, name, state["progress"][name])
        self.schedule.set(self.step)


def save_last(trainer, folder):
    """Write last.pt on rank 0, the one before becomes previous.pt; a full disk is said and survived."""
    trainer.saved_s = time.monotonic()
    if not trainer.process.is_main or not all(
        v.isfinite().all() for v in trainer.network.state_dict().values()
    ):
        return  # spoilt weights must not replace good ones; BadSteps stops such a run
    last = folder / "last.pt"
    try:
        with write_atomic(last) as part:
            torch.save(trainer.state(), part)
            if last.exists():
                os.replace(last, folder / "previous.pt")
    except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError
        reason = str(error).splitlines()[0]
        print(f"{last}: not written ({reason}); the one before stays; free some space", flush=True)


class Stop:
    """Becomes true on all ranks at once after SIGTERM or SIGINT to any of them."""

    def __init__(self, process):
        self.signal, self.process = 0, process  # what all ranks agreed on
        self.caught = 0  # apart, since a signal may come while they do
        # its own group: on CUDA the default one would make the CPU wait for the device
        self.group = dist.new_group(backend="gloo") if process.world > 1 else None
        self.before = {
            number: signal.signal(number, self.catch) for number in (signal.SIGTERM, signal.SIGINT)
        }

    def catch(self, number, frame):
        self.caught = number

    def agree(self):
        self.signal = self.caught
        if self.group is not None:
            number = torch.tensor(self.signal)
            dist.all_reduce(number, dist.ReduceOp.MAX, group=self.group)
            self.signal = int(number)
        return self.signal

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def steps_of(trainer, loader):
    """Yield, for each remaining step of the epoch, its batches, their item indices and the seconds waited."""
    sampler = loader.batch_sampler
    sampler.epoch, sampler.start = divmod(trainer.step, trainer.steps_per_epoch)
    batches, indices, data_s = [], [], 0.0
    before = time.perf_counter()
    for *batch, index in loader:
        waited_s = time.perf_counter() - before
        batches.append(trainer.prepare(len(batches), *batch))
        # with online simulation, preparing a batch may wait for it
        data_s += waited_s if trainer.online is None else time.perf_counter() - before
        indices += index.tolist()
        if len(batches) == trainer.cfg.accumulate:
            yield batches, indices, data_s
            batches, indices, data_s = [], [], 0.0
        before = time.perf_counter()


def train_epoch(trainer, loader, log, bad_steps, stop, profiler):
    """The rest of the current epoch, or up to a stop."""
    cfg = trainer.cfg
    for batches, indices, data_s in steps_of(trainer, loader):
        torch.manual_seed(trainer.step_seed() + trainer.process.rank)  # drop path
        losses, mae, norm = trainer.train_step(batches)
        bad_steps.add(norm, losses, batches, indices)
        log.add(mae, norm, data_s)
        if profiler is not None:
            profiler.step()
        if trainer.step % cfg.log_every == 0 or trainer.step == trainer.n_steps:
            log.write()
        if trainer.step % cfg.save_every == 0 or time.monotonic() - trainer.saved_s > 60 * cfg.save_minutes:
            save_last(trainer, log.folder)
        if stop.agree():
            break
    bad_steps.check()
    if cfg.skip_bad_files:
        count_skipped(trainer, loader, log)


def count_skipped(trainer, loader, log):
    """Print and log how many reads of bad samples all ranks have replaced so far."""
    process = trainer.process
    mine = torch.tensor(float(sum(loader.dataset.skipped.values())), device=process.device)
    n = int(process.sum(mine).item())
    if process.is_main and n:
        print(f"{n} samples of bad files skipped so far (--skip_bad_files)", flush=True)
        log.record({"step": trainer.step, "skipped_samples": n})
