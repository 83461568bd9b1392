"""Loading weights into networks: checks, and a guess at the backbone of weights that do not fit."""

import torch

SIZES = {  # (stem width, blocks in the third stage): size
    "convnext": {
        **{(40, 6): "atto", (48, 6): "femto", (64, 6): "pico", (80, 8): "nano", (96, 9): "tiny"},
        **{(96, 27): "small", (128, 27): "base", (192, 27): "large", (256, 27): "xlarge", (352, 27): "huge"},
    },
    "caformer": {(64, 9): "s18", (64, 18): "s36", (96, 18): "m36", (128, 18): "b36"},
}


def guess_backbone(state):
    """Name of the timm backbone suggested by a state dict's keys and shapes, or None."""
    depth = len({key.split(".")[3] for key in state if key.startswith("backbone.stages_2.blocks.")})
    for family, stem in (
        ("convnext", "backbone.stem_0.1.weight"),
        ("caformer", "backbone.stem.1.conv.weight"),
    ):
        if stem in state and (len(state[stem]), depth) in SIZES[family]:
            version = "v2" if any(".grn." in key for key in state) else ""
            return f"{family}{version}_{SIZES[family][len(state[stem]), depth]}"
    return None


def matching(state, wanted, name="state dict"):
    """The part of a state dict that matches most keys of `wanted` after a common prefix is removed.

    Prefixes come from torch.compile, DDP and modules that contain the network, such as Lightning's; anything
    else in such a module is left out. Raises ValueError if two networks under different prefixes fit equally.
    """
    state = {str(key).replace("_orig_mod.", ""): value for key, value in state.items()}
    some = list(wanted)[:: max(1, len(wanted) // 8)]  # all keys of a network share its prefix: a few suffice
    prefixes = {key[: -len(end)] for end in some for key in state if f".{key}".endswith(f".{end}")}
    counts = {prefix: sum(prefix + key in state for key in wanted) for prefix in sorted(prefixes)}
    most = max(counts.values(), default=0)
    best = [prefix for prefix, n in counts.items() if n == most]
    if len(best) > 1:
        raise ValueError(
            f"{name}: several networks, under {', '.join(best)}; save the one to use in a file of its own"
        )
    prefix = best[0] if best else ""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def differences(state, wanted):
    """How a state dict differs from the wanted {key: tensor}: {kind of difference: keys}."""
    found = {
        "misses": [key for key in wanted if key not in state],
        "has unexpected": [key for key in state if key not in wanted],
        "has another shape of": [k for k in wanted if k in state and wanted[k].shape != state[k].shape],
    }
    return {what: keys for what, keys in found.items() if keys}


def load_weights(model, state, name="state dict"):
    """Load a state dict strictly, apart from prefixes such as those of torch.compile, DDP and Lightning.

    Raises ValueError if it does not fit, naming the backbone that it seems to belong to, and for NaN.
    """
    if not isinstance(state, dict):
        raise ValueError(f"{name}: its weights are a {type(state).__name__}, expected a state dict")
    mine = model.state_dict()
    state = matching(state, mine, name)
    if found := differences(state, mine):
        guess = guess_backbone(state)
        remedy = (
            f"it seems to be a {guess}: --backbone={guess}"
            if guess
            else "give the options it was trained with, as --arch, --backbone, --width, --decoder_norm"
        )
        if guess and guess.startswith("caformer"):
            remedy += " --norm=layer --activation=original --upsample=pixelshuffle --scse --skip_convs"
        faults = ", ".join(f"{what} {keys[0]}" for what, keys in found.items())
        raise ValueError(f"{name}: does not fit this network ({faults}); {remedy}")
    fill(model, state, name)


def fill(model, state, name):
    """Load a state dict that fits; raises ValueError, naming the tensor, for values that are not finite."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:  # tensors that are sparse, quantized or without values
        raise ValueError(
            f"{name}: tensors that cannot be copied ({str(error).strip().splitlines()[-1].strip()[:160]}); "
            "save them dense, as floating-point numbers"
        ) from None
    check_finite(model, name)


def check_finite(model, name):
    """Raise ValueError, naming the tensor, if a network that was filled from `name` holds NaN or infinity."""
    for key, value in model.state_dict().items():
        if n := int((~torch.isfinite(value)).sum()):
            raise ValueError(
                f"{name}: {key} holds NaN or infinity ({n} of {value.numel()} values); use another checkpoint"
            )
