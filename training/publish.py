"""Publish weights: `python -m training.publish --ckpt=RUN/best.pt --out=weights/NAME.safetensors`.

They are stored in float16, half the size of a checkpoint. The card NAME.json, written to the same folder,
holds the network's options, which `infer.py` and `train.py` read, the file's SHA-256, which they check, and
the origin of the weights. --accuracy takes the file that `python bench.py accuracy --json=FILE` wrote.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch

from cfg import NETWORK_FIELDS, Config, network_config
from model import build_model
from networks.checkpoints import averaged_weights, load_checkpoint
from networks.weights import load_weights
from options.command_line import parse_options
from options.fields import Options, Section
from options.outputs import check_replaces
from system.files import load_json, read_lines, write_atomic, write_json
from utils import run_program

PUBLISH = Section("publish", "weights to share")


@dataclass
class PublishOptions(Options):
    """The options of `python -m training.publish`."""

    ckpt: str = PUBLISH("", "best.pt of a run", path=True)
    out: str = PUBLISH("", "file to write, NAME.safetensors", writes="file of weights")
    before: tuple = PUBLISH(
        (), "folders of the runs that the last one started from, in their order", path=True
    )
    accuracy: str = PUBLISH("", "file that `bench.py accuracy --json` wrote of these weights", path=True)


def half(state):
    """Weights in float16, whole numbers unchanged; raises ValueError, naming the tensor, if one overflows."""
    halved = {name: (v.half() if v.is_floating_point() else v).contiguous() for name, v in state.items()}
    for name, tensor in halved.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name}: values up to {state[name].abs().max():g} do not fit into float16")
    return halved


def stage(folder):
    """A run's entry in the card: command, commit, versions, device, samples seen and hours.

    Raises ValueError for a folder that is not a run folder.
    """
    folder = Path(folder)
    rows = dict(line.split(": ", 1) for line in read_lines(folder / "env.txt") if ": " in line)
    records = [json.loads(line) for line in read_lines(folder / "log.jsonl")]
    records = [record for record in records if "samples_per_s" in record]
    if not rows or not records:
        raise ValueError(f"{folder}: not a run folder, its env.txt or log.jsonl is missing or empty")
    last = load_checkpoint(folder / "last.pt")
    entry = {name: rows[name] for name in ("command", "commit", "torch", "device") if name in rows}
    entry["command"] = re.sub(r"=/\S*/", "=", entry["command"])  # paths of one machine mean nothing elsewhere
    steps = np.diff([0, *(record["step"] for record in records)])
    seconds = steps * last["global_batch"] / [record["samples_per_s"] for record in records]
    entry["samples"] = last["progress"]["step"] * last["global_batch"]
    return entry | {"hours": round(float(seconds.sum()) / 3600, 2)}


def publish(args):
    """Write weights and card; returns the card. Raises ValueError for a checkpoint of no training run."""
    path, out = Path(args.ckpt), Path(args.out)
    if out.suffix != ".safetensors":
        raise ValueError(f"--out={out}: expected a name that ends in .safetensors")
    check_replaces(out.with_suffix(".json"), "card of weights")
    if out.exists() and out.samefile(path):
        raise ValueError(f"--out={out}: is the checkpoint itself; give another name")
    checkpoint = load_checkpoint(path)
    cfg = network_config(Config(ckpt=str(path)), checkpoint)
    weights = half(averaged_weights(checkpoint))
    load_weights(build_model(cfg), weights, path)
    content = safetensors.torch.save(weights)
    card = {"sha256": hashlib.sha256(content).hexdigest(), "licence": "MIT"}
    card |= {"network": {name: getattr(cfg, name) for name in NETWORK_FIELDS}}
    card |= {"stages": [stage(folder) for folder in (*args.before, path.parent)]}
    if args.accuracy:
        card["accuracy"] = load_json(args.accuracy)
    out.parent.mkdir(parents=True, exist_ok=True)
    with write_atomic(out) as file:
        file.write(content)
    write_json(out.with_suffix(".json"), card)
    return card


def main(argv):
    """Publish a checkpoint according to the options."""
    args = parse_options(argv, PublishOptions, __doc__)
    card = publish(args)
    samples = sum(run["samples"] for run in card["stages"])
    print(f"{args.out}: {samples} samples, SHA-256 {card['sha256']}")


if __name__ == "__main__":
    run_program(main)
