"""Weights put into networks: checked, and the backbone guessed from them."""

import pickle
from pathlib import Path

import torch

SIZES = {  # (stem width, blocks in the third stage): size
    "convnext": {
        **{(40, 6): "atto", (48, 6): "femto", (64, 6): "pico", (80, 8): "nano", (96, 9): "tiny"},
        **{(96, 27): "small", (128, 27): "base", (192, 27): "large", (256, 27): "xlarge", (352, 27): "huge"},
    },
    "caformer": {(64, 9): "s18", (64, 18): "s36", (96, 18): "m36", (128, 18): "b36"},
}


def guess_backbone(state):
    """Name of the timm backbone that a state dict's keys and shapes suggest, or None."""
    depth = len({key.split(".")[3] for key in state if key.startswith("backbone.stages_2.blocks.")})
    for family, stem in (
        ("convnext", "backbone.stem_0.1.weight"),
        ("caformer", "backbone.stem.1.conv.weight"),
    ):
        if stem in state and (len(state[stem]), depth) in SIZES[family]:
            version = "v2" if any(".grn." in key for key in state) else ""
            return f"{family}{version}_{SIZES[family][len(state[stem]), depth]}"
    return None


def load_weights(model, source, name="state dict"):
    """Load a state dict, or the path of one, strictly, without the prefixes of torch.compile and DDP.

    Raises ValueError where it does not fit, with the backbone it seems to be of.
    """
    if isinstance(source, str | Path):
        name = source
        try:
            source = torch.load(source, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(f"{name}: no state dict that torch.load(weights_only=True) reads") from error
    state = {key.replace("_orig_mod.", "").removeprefix("module."): value for key, value in source.items()}
    mine = model.state_dict()
    faults = {
        "misses": [key for key in mine if key not in state],
        "has unexpected": [key for key in state if key not in mine],
        "has another shape of": [key for key in mine if key in state and mine[key].shape != state[key].shape],
    }
    found = ", ".join(f"{what} {keys[0]}" for what, keys in faults.items() if keys)
    if found:
        guess = guess_backbone(state)
        remedy = (
            f"it seems to be a {guess}: --backbone={guess}" if guess else "give its --arch and --backbone"
        )
        if guess and guess.startswith("caformer"):
            remedy += " --norm=layer --activation=original --upsample=pixelshuffle --scse --skip_convs"
        raise ValueError(f"{name}: does not fit this network ({found}); {remedy}")
    model.load_state_dict(state)
