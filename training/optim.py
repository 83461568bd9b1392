"""Optimizers and the learning-rate schedule."""

import torch
from timm.scheduler import CosineLRScheduler


def _matrix(tensor, p):
    """A kernel as a matrix (out, rest), with the rest in the order that parameter `p` has in memory."""
    if tensor.ndim == 4 and not p.is_contiguous():
        tensor = tensor.permute(0, 2, 3, 1)  # channels last; the order of columns does not matter to Muon
    return tensor.flatten(1)


class MuonAdamW(torch.optim.Optimizer):
    """Muon on hidden matrices and kernels, AdamW on everything else, as one optimizer.

    Muon (Jordan et al., 2024) is torch's implementation. It takes only matrices, so it is given kernels
    (out, in, k, k) as views (out, in·k·k) of the same memory.
    """

    def __init__(self, hidden, groups, lr, weight_decay):
        super().__init__([{"params": hidden}, *groups], {"lr": lr, "weight_decay": weight_decay})
        self.views = [_matrix(p.detach(), p) for p in hidden]
        assert all(v.data_ptr() == p.data_ptr() for v, p in zip(self.views, hidden, strict=True)), "copies"
        # scaled to AdamW's usual step, so that both share one rate (Liu et al., 2025, arXiv 2502.16982)
        muon = torch.optim.Muon(self.views, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        adamw = torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, fused=True)
        self.parts = {"muon": muon, "adamw": adamw}

    _step_supports_amp_scaling = True  # then the scaler leaves it to `step` to skip non-finite gradients

    @torch.no_grad()
    def step(self, closure=None):
        """One step; if the scaler's `found_inf` is set, the device undoes it, and the CPU need not wait."""
        muon, adamw = self.parts.values()
        found_inf = adamw.found_inf = getattr(self, "found_inf", None)
        for view, p in zip(self.views, self.param_groups[0]["params"], strict=True):
            view.grad = None if p.grad is None else _matrix(p.grad, p)
            if view.grad is not None and not muon.state[view]:
                muon.state[view]["momentum_buffer"] = torch.zeros_like(view.grad)
        inner = [group for part in self.parts.values() for group in part.param_groups]
        for group, mine in zip(inner, self.param_groups, strict=True):
            group["lr"] = mine["lr"]
        changed = [*self.views, *(state["momentum_buffer"] for state in muon.state.values())]
        before = [tensor.clone() for tensor in changed]
        for part in self.parts.values():
            part.step()
        if found_inf is not None:
            for tensor, old in zip(changed, before, strict=True):
                tensor.copy_(torch.where(found_inf > 0, old, tensor))

    def state_dict(self):
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state):
        for name, part in self.parts.items():
            load_state(part, state[name])


def load_state(optimizer, state):
    """Load a saved state into an optimizer, which keeps its own options such as rates and `fused`.

    Raises ValueError, or an error of torch, if the state does not fit: a wrong shape could crash the process.
    """
    if isinstance(optimizer, MuonAdamW):
        return optimizer.load_state_dict(state)
    groups = [
        {**mine, "params": saved["params"]}
        for mine, saved in zip(optimizer.param_groups, state["param_groups"], strict=True)
    ]
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})
    names = set().union(*optimizer.state.values())
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        found = optimizer.state.get(p, {})
        if lacking := names - found.keys():
            raise ValueError(f"it lacks {', '.join(sorted(lacking))} of a {tuple(p.shape)} tensor")
        for name, value in found.items():
            fits = isinstance(value, torch.Tensor) and value.shape in (p.shape, ())
            if not (fits and value.isfinite().all()):
                raise ValueError(f"its {name} of a {tuple(p.shape)} tensor does not fit or is not finite")


def build_optimizer(network, cfg):
    """AdamW with weight decay on matrices and kernels only, or Muon with AdamW for the other parameters.

    Raises ValueError if this torch has no Muon.
    """
    named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    matrices = [p for _, p in named if p.ndim > 1]
    vectors = {"params": [p for _, p in named if p.ndim <= 1], "weight_decay": 0.0}
    common = {"lr": cfg.lr, "weight_decay": cfg.weight_decay}
    if cfg.optimizer == "muon":
        if not hasattr(torch.optim, "Muon"):
            raise ValueError(
                f"--optimizer=muon: torch {torch.__version__} has no Muon; use torch 2.9 or adamw"
            )
        # depthwise kernels, whose channels are not mixed, and single rows are left to AdamW
        hidden = [p for p in matrices if p.shape[1] > 1 and len(p) > 1]
        rest = [p for p in matrices if p.shape[1] == 1 or len(p) == 1]
        return MuonAdamW(hidden, [{"params": rest}, vectors], **common)
    # fused: one kernel, which skips a non-finite gradient on the device without waiting for the CPU
    return torch.optim.AdamW([{"params": matrices}, vectors], fused=True, **common)


class Schedule:
    """Learning rate by steps: linear warm-up, constant, cosine to min_lr (timm's CosineLRScheduler)."""

    def __init__(self, optimizer, cfg, n_steps):
        self.warmup = cfg.warmup_steps
        self.hold = round(cfg.constant_share * max(0, n_steps - self.warmup))
        self.timm = CosineLRScheduler(
            optimizer,
            t_initial=max(1, n_steps - self.warmup - self.hold),
            lr_min=cfg.min_lr,
            warmup_t=self.warmup,
            warmup_lr_init=cfg.min_lr,
            warmup_prefix=True,
            t_in_epochs=False,
        )

    def set(self, step):
        """Set the learning rate of the update after `step` updates."""
        self.timm.step_update(step if step <= self.warmup else max(self.warmup, step - self.hold))
