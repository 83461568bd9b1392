"""ImageNet weights for timm's encoders: downloaded by timm, or read from a file whose keys must fit."""

import contextlib
import os
import re
import sys
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import huggingface_hub
import timm
import torch
from huggingface_hub import constants as hub

from networks.checkpoints import averaged_weights, load_checkpoint
from networks.weights import differences, matching

OTHERWISE = "use --pretrained=PATH (timm weights, .safetensors or .pth) or --pretrained=false"
MAX_UNFILLED = 5  # a file may lack this many tensors, which keep their initial values; they are named
OUR_STEMS = re.compile(r"(^|\.)(stem_0\.1|stem\.1\.conv)\.weight$")  # keys that timm's own files do not have


def pretrained_source(cfg):
    """Where the encoder's initial weights come from: (arguments for timm, a state dict of our names or None).

    They are read from --pretrained=PATH if given, else from the download cache, else timm downloads them.
    Raises ValueError for a file that does not fit and for weights that are not available.
    """
    if not cfg.pretrained:
        return {}, None
    path = cfg.pretrained
    if path is True:
        source = timm.get_pretrained_cfg(cfg.backbone)
        if source is None or not source.hf_hub_id:
            raise ValueError(f"--backbone={cfg.backbone}: timm has no pretrained weights of it; {OTHERWISE}")
        path = huggingface_hub.try_to_load_from_cache(source.hf_hub_id, "model.safetensors")
    if isinstance(path, str):
        try:
            state = averaged_weights(load_checkpoint(path, "--pretrained"))
            if any(map(OUR_STEMS.search, state)):
                return {}, state
            state = timm_weights(state, cfg.backbone, path)
        except ValueError as error:
            raise ValueError(f"{error}, or use --pretrained=false") from None
        return {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": state}}, None
    try:  # without a network connection timm would take a minute to give up
        urlopen(Request(hub.ENDPOINT, method="HEAD"), timeout=5)
    except HTTPError:
        pass  # the server answered
    except OSError as error:
        reason = f"{hub.ENDPOINT} cannot be reached"
        raise ValueError(f"pretrained weights of {cfg.backbone}: {reason}; {OTHERWISE}") from error
    return {"pretrained": True}, None


def timm_weights(state, backbone, path):
    """The weights in a file under timm's names; prints how many fit, raises ValueError if too few do."""
    with torch.device("meta"):
        model = timm.create_model(backbone)
    wanted = {key: value for key, value in model.state_dict().items() if not key.startswith("head.")}
    flat = re.compile(r"(^|\.)(stem|stages)_(\d)")  # the names within timm's feature extractors
    found = matching({flat.sub(r"\1\2.\3", key): value for key, value in state.items()}, wanted, path)
    if not any(key in wanted for key in found):
        with contextlib.suppress(KeyError, AttributeError, RuntimeError):  # names of the original authors
            found = sys.modules[type(model).__module__].checkpoint_filter_fn(found, model)
    check_filled(found, wanted, backbone, path)
    return {key: value for key, value in found.items() if key in wanted}


def check_filled(state, wanted, backbone, path):
    """Print how many of the encoder's tensors a state dict fills; ValueError if many are missing."""
    faults = differences(state, wanted)
    unfilled = faults.get("misses", []) + faults.get("has another shape of", [])
    count = f"{len(wanted) - len(unfilled)} of {len(wanted)} tensors of {backbone}'s encoder"
    if len(unfilled) > MAX_UNFILLED:
        first = f"the first it lacks is {unfilled[0]}"
        others = faults.get("has unexpected")
        first += f", the first it has instead {others[0]}" if others else ""
        raise ValueError(f"{path}: fills {count} ({first}); give a file of this --backbone")
    rest = f"; these keep their initial values: {', '.join(unfilled)}" if unfilled else ""
    if os.environ.get("RANK", "0") == "0":
        print(f"{path}: fills {count}{rest}", flush=True)
