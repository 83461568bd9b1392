"""The state of a training run, as checkpoints hold it, and the preparation of batches."""

import contextlib
import dataclasses
import math
import time

import torch
from timm.utils import ModelEmaV3
from torch.nn.parallel import DistributedDataParallel

from data import flip_batch
from model import EXTRAS, build_model, extra_loss
from networks.checkpoints import averaged_weights, load_checkpoint
from networks.weights import load_weights
from openfwi.modes import preprocess
from system.devices import AUTOCAST, pick_precision, to_device
from training.augment import augment, draw, is_on
from training.loss import parse_family_weights, sample_losses
from training.optim import Schedule, build_optimizer, load_state

PROGRESS = ("step", "validated", "best_mae", "since_best", "best_saved_mae")


class Trainer:
    """The network, its average, optimizer, schedule and scaler: everything that a checkpoint holds."""

    def __init__(self, cfg, process, steps_per_epoch, network=None, samples=None):
        self.cfg, self.process = cfg, process
        self.step, self.validated, self.best_mae, self.since_best = 0, 0, math.inf, 0
        self.best_saved_mae = math.inf  # of best.pt; larger than best_mae if the disk was full
        self.saved_s = time.monotonic()
        self.steps_per_epoch, self.n_steps = steps_per_epoch, cfg.epochs * steps_per_epoch
        self.global_batch = cfg.batch_size * cfg.accumulate * process.world
        self.samples = samples or {}  # see `describe_samples`
        self.precision = pick_precision(cfg.precision, process.device)
        self.dtype = AUTOCAST.get(self.precision)
        self.family_weights = parse_family_weights(cfg.family_weights).to(process.device)
        self.network = (network or build_model(cfg)).to(process.device)
        if cfg.ckpt:
            load_weights(self.network, averaged_weights(load_checkpoint(cfg.ckpt)), cfg.ckpt)
        self.buffers = [b for b in self.network.buffers() if b.is_floating_point()]
        # The average stays in float32 and includes buffers. It is made before DDP and compilation, which
        # rename parameters.
        self.ema = ModelEmaV3(self.network, decay=cfg.ema_decay, use_warmup=True)
        self.optimizer = build_optimizer(self.network, cfg)
        self.schedule = Schedule(self.optimizer, cfg, self.n_steps)
        # The scaler skips non-finite steps in every precision; only float16 needs a scale. It starts near the
        # value it will reach: torch's default, 65536, would cost the first seven steps.
        scale = 512.0 if self.dtype is torch.float16 else 1.0
        self.scaler = torch.amp.GradScaler(process.device.type, init_scale=scale)
        self.forward, self.no_sync = self.network, contextlib.nullcontext
        self.online = None  # online.Online, while training with simulated samples
        if process.world > 1:
            ids = [process.device] if process.device.type == "cuda" else None
            # buffers: share_statistics keeps them equal
            self.forward = DistributedDataParallel(self.network, device_ids=ids, broadcast_buffers=False)
            self.no_sync = self.forward.no_sync
        if cfg.compile != "off":
            self.forward = torch.compile(self.forward, mode=cfg.compile)

    def autocast(self):
        return torch.autocast(self.process.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def losses(self, forward, seis, vel, family):
        """Loss and mean absolute error of each sample, (B,) m/s each."""
        wants_extras = any(getattr(self.cfg, name) for name in EXTRAS)
        with self.autocast():
            prediction, extras = forward(seis, extras=True) if wants_extras else (forward(seis), {})
        losses = sample_losses(prediction, vel, family, self.cfg, self.family_weights)
        if extras:
            losses = losses + extra_loss(extras, prediction, vel, family)
        return losses, (prediction.detach() - vel).abs().mean((1, 2, 3))

    def batch_statistics(self):
        """The running statistics of batch norm as one vector; None for a network without batch norm."""
        return torch.cat([b.flatten() for b in self.buffers]) if self.buffers else None

    def share_statistics(self, before, keep):
        """Average the statistics of batch norm over all ranks; unless `keep`, restore those of `before`."""
        if self.buffers:
            mean = self.process.sum(self.batch_statistics()) / self.process.world
            pieces = torch.where(keep, mean, before).split([b.numel() for b in self.buffers])
            torch._foreach_copy_(
                self.buffers, [p.view_as(b) for p, b in zip(pieces, self.buffers, strict=True)]
            )

    def prepare(self, micro, seis, vel, family):
        """Copy a batch to the device and augment it; the seed, the step and the place in the global batch
        decide how."""
        cfg, process = self.cfg, self.process
        seis, vel, family = (to_device(t, process.device) for t in (seis, vel, family))
        shape, mine = (cfg.accumulate, process.world, len(seis)), (micro, process.rank)
        generator = torch.Generator().manual_seed(self.step_seed())
        seis, vel = flip_batch(seis, vel, torch.rand(shape, generator=generator)[mine] < cfg.flip_p)
        if self.online is not None:  # simulated samples have exact mirror images instead
            first = (micro * process.world + process.rank) * len(seis)
            self.online.mix(self.step, first, seis, vel, family)
        if is_on(cfg):
            seis, vel = augment(seis, vel, cfg, *(drawn[mine] for drawn in draw(shape, generator)))
        return preprocess(seis, cfg.mode), vel, family

    def step_seed(self):
        """The random seed of the current step."""
        return self.cfg.seed + 1_000_003 * self.step

    def state(self):
        """Everything that resuming needs, for a checkpoint."""
        return {
            "model": self.network.state_dict(),
            "ema": self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": {name: getattr(self, name) for name in PROGRESS},
            "global_batch": self.global_batch,
            "samples": self.samples,
            "cfg": dataclasses.asdict(self.cfg),
        }

    def restore(self, state, name):
        """Continue from a `state` of the run folder `name`. Raises ValueError if it does not fit."""
        load_weights(self.network, state["model"], f"{name}: model")
        load_weights(self.ema.module, state["ema"], f"{name}: ema")
        try:
            load_state(self.optimizer, state["optimizer"])
            scale = {name: state["scaler"][name] for name in ("scale", "_growth_tracker")}
            self.scaler.load_state_dict(self.scaler.state_dict() | scale)
            if not 0 < float(scale["scale"]) < math.inf or type(scale["_growth_tracker"]) is not int:
                raise ValueError(f"scale {scale['scale']}, growth {scale['_growth_tracker']}")
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{name}: optimizer or scaler of another kind, or damaged ({error}); "
                f"start from its weights with --ckpt={name}/last.pt"
            ) from None
        for key in PROGRESS:
            setattr(self, key, state["progress"].get(key, state["progress"]["best_mae"]))
        self.schedule.set(self.step)
