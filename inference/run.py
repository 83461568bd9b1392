"""One call of infer.py: its inputs and networks, reading batches, and saving results as they are made."""

import contextlib
import dataclasses
import os

import numpy as np
import torch

from cfg import fields_that_decide
from inference.ensemble import Ensemble, checkpoint_paths
from inference.outputs import check_outputs
from inference.results import digest, fingerprint
from openfwi.gathers import GatherDataset, check_values, find_gathers, find_truths, read_truth
from parallel.work import Bar, code_version, handed_out
from postprocess import load_fit, run_steps
from report.scores import mae_of
from system.devices import to_device
from training.loader import Loader

OF_A_PROCESS = ("device", "gpus", "threads", "workers")  # options that may differ between processes

N_COMPARED = 8  # gathers whose contents must be the same on all processes


class Run:
    """One call of `infer`: its options, inputs and networks; `infer` adds `work` and `stop`."""

    def __init__(self, cfg, process):
        self.cfg, self.process, self.device = cfg, process, process.device
        self.gathers = find_gathers(cfg.input)
        self.truths = find_truths(cfg.truth, self.gathers) if cfg.truth else None
        check_outputs(cfg, self.gathers, self.truths)
        if process.is_main:
            check_values(self.gathers)
        self.fitted = load_fit(cfg.use, len(checkpoint_paths(cfg.ckpt))) if cfg.use else {}
        self.ensemble = Ensemble(cfg, self.device, self.fitted.get("ensemble_weights"))
        refines = cfg.refine != "none"
        self.needs_misfit = bool(cfg.misfit or cfg.figures or cfg.pseudo or refines)
        # recognising families takes another pass of the network
        self.needs_families = bool(cfg.post or cfg.fit or cfg.pseudo or refines)
        contents = {path: fingerprint(path) for path in {path for path, *_ in self.truths or ()}}
        truths = [(contents[path], *which) for path, *which in self.truths or ()]
        self.contents = {"ids": digest([gather.oid for gather in self.gathers]), "truths": digest(truths)}

    def seen(self):
        """What must be the same on all processes, {what it is: value}."""
        options = dataclasses.asdict(self.cfg).items()
        seen = {"code": code_version()}
        seen |= {f"--{name}": value for name, value in options if name not in OF_A_PROCESS}
        seen["checkpoints"] = [fingerprint(member.path) for member in self.ensemble.members]
        seen["fitted values"] = digest(self.fitted)
        seen["gathers"] = f"{len(self.gathers)}, {digest([gather.oid for gather in self.gathers])}"
        some = np.unique(np.linspace(0, len(self.gathers) - 1, N_COMPARED).round().astype(int)).tolist()
        seen["gathers' contents"] = digest(GatherDataset(self.gathers).read_batch(some)[1].tolist())
        return seen | {"true maps": self.contents["truths"]}

    @property
    def steps(self):
        """Names of the post-processing steps in order, with `auto` replaced by the fitted ones."""
        auto = self.fitted.get("post")
        return [step for name in self.cfg.post for step in (auto if name == "auto" else [name])]

    @property
    def stages(self):
        """Names of the stages that a map goes through."""
        return ["network", *self.steps, *([self.cfg.refine] if self.cfg.refine != "none" else [])]

    def decided_by(self, result, cfg):
        """What a saved result depends on, for JSON: options, and the contents of the files that they name.

        The contents of the gathers are not included: `forget_changed` compares them for each record.
        """
        return {name: getattr(cfg, name) for name in fields_that_decide(result)} | self.contents

    def truth(self, numbers):
        """True maps (B, 1, 70, 70) m/s of the gathers `numbers`."""
        return torch.stack([read_truth(*self.truths[i]) for i in numbers])

    def errors(self, maps, numbers):
        """Errors (B, K) in m/s of K maps (B, 1, 70, 70) of each gather; 0 without --truth."""
        if not self.truths:
            return 0.0
        truth = self.truth(numbers)
        return torch.stack([mae_of(vel, truth) for vel in maps], 1).numpy()

    def read(self, batches, expected=None, is_slow=False):
        """Yield (numbers, seis on the device, digests) of each batch, read ahead; may stop between batches.

        expected: the digests of all gathers. Raises ValueError for a gather that has changed since then.
        is_slow: a batch takes much longer to process than to read, so none is read ahead: another process
        could take it.
        """
        n_workers = 0 if is_slow else min(self.cfg.workers, os.cpu_count() or 1)
        for seis, digests, numbers in Loader(
            GatherDataset(self.gathers), batches, n_workers, self.device, ahead=False
        ):
            numbers, digests = numbers.tolist(), digests.numpy()
            if expected is not None and (changed := (digests != expected[numbers]).any(1)).any():
                raise ValueError(
                    f"{self.gathers[numbers[changed.argmax()]]}: replaced since its map was predicted; "
                    "run the same command again, which predicts it again"
                )
            yield numbers, to_device(seis, self.device), digests
            self.stop.check()

    def results(self, name, job, fields, forget):
        """`Work.results` of all gathers."""
        return self.work.results(name, job, len(self.gathers), fields, forget, self.stop.check)

    @contextlib.contextmanager
    def taking(self, results, batches, name, disable=False):
        """Yield the batches that this process takes, and a progress bar; then join all processes' results.

        batches: all batches with a record that is not done.
        """
        n, todo = len(self.gathers), sum(map(len, batches))
        options = {"total": n, "initial": n - todo, "unit": "map", "desc": name, "disable": disable}
        with Bar(self.process, results.path.stem, **options) as bar:
            yield handed_out(self.process, results.path.stem, batches), bar

            def pause():
                bar.update()
                self.stop.check()

            self.work.join(results, pause)
            bar.update()

    def processed(self, vel, families):
        """The maps (B, 1, 70, 70) after each post-processing step, a list."""
        return run_steps(self.steps, vel, families, self.fitted.get("statistics"))

    def model(self, families):
        """The whole prediction, before refining, as a function of full gathers."""

        def predict_again(seis):
            vel = self.ensemble.predict(seis)
            return [vel, *self.processed(vel, families)][-1]

        return predict_again
