"""Size and speed of a network: `python bench.py network --arch=seisnext`."""

import dataclasses
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from cfg import NETWORK, parse
from model import UNet, build_model
from openfwi.modes import MODE_SHAPES


def measure(cfg, batch):
    """Size and speed of the network of a configuration: {what: text}."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = build_model(cfg).to(device)
    seis = torch.randn(batch, *MODE_SHAPES[cfg.mode], device=device)
    saved = {}

    def keep(tensor):
        saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(seis).mean().backward()
    activations = sum(saved.values()) - sum(saved.get(p.data_ptr(), 0) for p in network.parameters())
    training_ms = _time_ms(lambda: network(seis).mean().backward(), device)
    network.eval().requires_grad_(False)
    forward_ms = _time_ms(lambda: network(seis), device)
    with FlopCounterMode(display=False) as flops:
        network(seis)
    table = {
        "parameters": f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f} M",
        "multiply-adds": f"{flops.get_total_flops() / 2e9 / batch:.2f} G a sample",
        "activations": f"{activations / 1e6 / batch:.1f} MB a sample, kept for the gradient",
        "forward": f"{forward_ms / batch:.2f} ms a sample ({device.type}, batch {batch})",
        "forward + backward": f"{training_ms / batch:.2f} ms a sample",
    }
    if isinstance(network, UNet):
        features = network.backbone(network.scaling(seis))
        table["features"] = ", ".join("x".join(map(str, x.shape[1:])) for x in features)
    return table


def _time_ms(step, device, n=3):
    """Shortest time of n calls in ms, after one to warm up."""
    times = []
    for _ in range(n + 1):
        started = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - started))
    return min(times[1:])


def bench_networks(argv):
    """Print the size and speed of the network that the options describe."""
    cfg = parse(argv, NETWORK)
    torch.set_num_threads(cfg.threads or torch.get_num_threads())
    table = measure(dataclasses.replace(cfg, pretrained=False), cfg.batch_size)
    print(f"arch {cfg.arch}, mode {cfg.mode}" + (f", backbone {cfg.backbone}" if cfg.arch == "unet" else ""))
    for what, text in table.items():
        print(f"{what:20}{text}")
