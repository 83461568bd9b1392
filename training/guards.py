"""Guards of a training run: signals that stop it, steps that are not finite, output that fails."""

import contextlib
import errno
import math
import signal
import sys

import torch
import torch.distributed as dist

from system.devices import HostCopy
from system.files import append_json
from utils import SIGPIPE, StopSignals, drop_output, say_on_stderr


class BadSteps:
    """Count updates skipped for a non-finite gradient, log their samples, and stop after too many in a row.

    A step is checked after the next one has been queued, so that the device never waits for the check. Every
    rank sees the same gradient norm, so all of them decide alike.
    """

    def __init__(self, trainer, items, log):
        self.trainer, self.items, self.log = trainer, items, log
        self.waiting, self.in_row, self.total = None, 0, 0

    def add(self, norm, losses, batches, indices):
        """Check the previous step, and keep this one for the next check."""
        self.check()
        scale = self.trainer.scaler.get_scale
        self.waiting = (self.trainer.step, HostCopy(norm), scale, losses, batches, indices)

    def name(self, step, k, n_batch, index):
        """Name sample k of this rank in a step: file and row, or what was simulated in its place."""
        process, online = self.trainer.process, self.trainer.online
        micro, within = divmod(k, n_batch)
        place = (micro * process.world + process.rank) * n_batch + within
        pair, row = self.items[index]
        return (online and online.name(step, place)) or f"{pair.seis}[{row}]"

    def check(self):
        """Check the step that was kept; raises ArithmeticError after `max_bad_steps` in a row."""
        if self.waiting is None:
            return
        step, norm, scale, losses, batches, indices = self.waiting
        self.waiting = None
        if math.isfinite(norm.get().item()):
            self.in_row = 0
            return
        self.total += 1
        lost = ~torch.isfinite(losses.cpu())
        named = [k for k, bad in enumerate(lost.tolist()) if bad or not lost.any()]
        samples = [self.name(step - 1, k, len(batches[0][0]), indices[k]) for k in named]
        rank = self.trainer.process.rank
        record = {"step": step, "rank": rank, "samples": samples}
        self.log.attempt(append_json, self.log.folder / "skipped.jsonl", record)
        # float16 finds its loss scale by overflowing: only at the smallest scale is this an error
        if scale() > 1:
            return
        self.in_row += 1
        if self.in_row >= self.trainer.cfg.max_bad_steps:
            culprit = find_culprit(self.trainer, batches)
            raise ArithmeticError(
                f"step {step}: {self.in_row} steps in a row with a non-finite loss or gradient; {culprit}; "
                f"samples {', '.join(samples[:4])}; {self.log.folder}/last.pt was saved before them"
            )


def find_culprit(trainer, batches):
    """Name the first parameter, layer or gradient of the network that is not finite on these batches."""
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


class Output:
    """Standard output whose errors do not end a run; if it is closed, as by `| head`, the run stops."""

    def __init__(self, stream, stop):
        self.stream, self.stop, self.failed = stream, stop, False

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with self.survived():
            return self.stream.write(text)
        return len(text)

    def flush(self):
        with self.survived():
            self.stream.flush()

    @contextlib.contextmanager
    def survived(self):
        try:
            yield
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO):  # the reader, or the terminal, is gone
                self.stop.number = self.stop.number or SIGPIPE
                drop_output()
            elif not self.failed:
                say_on_stderr(f"standard output: not written ({error.strerror}); training goes on without it")
            self.failed = True


class Stop(StopSignals):
    """A stop that all ranks agree on: after a signal to any of them, or when nobody reads the output."""

    def __init__(self, process):
        super().__init__("the current step or validation")
        self.process, self.signal = process, 0  # what all ranks agreed on; `number` may change meanwhile
        # a group of its own, since on CUDA the default one would make the CPU wait for the device
        self.group = dist.new_group(backend="gloo") if process.world > 1 else None

    def __enter__(self):
        super().__enter__()
        if self.before:  # outside the main thread, the process belongs to another program
            self.stream, sys.stdout = sys.stdout, Output(sys.stdout, self)
        return self

    def __exit__(self, *error):
        super().__exit__(*error)
        if self.before:
            sys.stdout = self.stream

    def agree(self):
        """Share the signal among all ranks; returns its number, 0 for none."""
        self.signal = self.number
        if self.group is not None:
            number = torch.tensor(self.signal)
            dist.all_reduce(number, dist.ReduceOp.MAX, group=self.group)
            self.signal = int(number)
        return self.signal

    def cause(self):
        """What stopped the run, as text."""
        return "nobody reading its output" if self.signal == SIGPIPE else signal.Signals(self.signal).name
