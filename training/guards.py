"""What guards a training run: signals that stop it, steps that are not finite."""

import math
import signal

import torch
import torch.distributed as dist

from utils import append_json


class BadSteps:
    """Counts updates left out for a non-finite gradient, writes their samples, stops after too many in a row.

    A step is looked at when the next one has been queued, so that the device never waits for the check.
    Every rank sees the same gradient norm, so all decide alike.
    """

    def __init__(self, trainer, items, log):
        self.trainer, self.items, self.log = trainer, items, log
        self.waiting, self.in_row, self.total = None, 0, 0

    def add(self, norm, losses, batches, indices):
        self.check()
        self.waiting = (self.trainer.step, norm, self.trainer.scaler.get_scale, losses, batches, indices)

    def name(self, step, k, n_batch, index):
        """This rank's sample k of a step: file and row of the item, or what was simulated in its place."""
        process, online = self.trainer.process, self.trainer.online
        micro, within = divmod(k, n_batch)
        place = (micro * process.world + process.rank) * n_batch + within
        pair, row = self.items[index]
        return (online and online.name(step, place)) or f"{pair.seis}[{row}]"

    def check(self):
        """Look at the step that waits; raises ArithmeticError after `max_bad_steps` in a row."""
        if self.waiting is None:
            return
        step, norm, scale, losses, batches, indices = self.waiting
        self.waiting = None
        if math.isfinite(norm.item()):
            self.in_row = 0
            return
        self.total += 1
        lost = ~torch.isfinite(losses.cpu())
        named = [k for k, bad in enumerate(lost.tolist()) if bad or not lost.any()]
        samples = [self.name(step - 1, k, len(batches[0][0]), indices[k]) for k in named]
        rank = self.trainer.process.rank
        record = {"step": step, "rank": rank, "samples": samples}
        self.log.attempt(append_json, self.log.folder / "skipped.jsonl", record)
        # float16 finds its loss scale by overflowing: only a scale that can fall no further is a fault
        if scale() > 1:
            return
        self.in_row += 1
        if self.in_row >= self.trainer.cfg.max_bad_steps:
            culprit = find_culprit(self.trainer, batches)
            raise ArithmeticError(
                f"step {step}: {self.in_row} steps in a row with a non-finite loss or gradient; {culprit}; "
                f"samples {', '.join(samples[:4])}; {self.log.folder}/last.pt is from before"
            )


def find_culprit(trainer, batches):
    """Say which parameter, layer or gradient of the network turns non-finite on these batches."""
    network = trainer.network
    for name, p in network.named_parameters():
        if not p.isfinite().all():
            return f"first non-finite weight: {name}"
    found = []

    def look(name):
        def hook(module, args, output):
            if not found and isinstance(output, torch.Tensor) and not output.isfinite().all():
                found.append(f"first non-finite output: layer {name} ({type(module).__name__})")

        return hook

    leaves = [(n, m) for n, m in network.named_modules() if not list(m.children())]
    handles = [module.register_forward_hook(look(name)) for name, module in leaves]
    for seis, vel, family in batches:
        if not seis.isfinite().all() or not vel.isfinite().all():
            found.append("first non-finite value: in the input itself")
        trainer.losses(network, seis, vel, family)[0].sum().backward()
    for handle in handles:
        handle.remove()
    found += [f"first non-finite gradient: {n}" for n, p in reversed(list(network.named_parameters()))
              if p.grad is not None and not p.grad.isfinite().all()]  # fmt: skip
    network.zero_grad(set_to_none=True)
    return found[0] if found else "not reproduced on this rank: see the other ranks' message"


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
