"""The configuration: one flat dataclass, edited here or overridden on the command line.

`--name=value` and `--name value` set a field, a bare `--name` sets a boolean, and
`--preset=NAME` starts from one of `PRESETS`; later words win over earlier ones.
"""

import contextlib
import dataclasses
import difflib
import inspect
from dataclasses import dataclass


@dataclass
class Config:
    """Everything a run depends on. Sequences are written `--families=FlatVel_A,Style_B`."""

    # run
    name: str = "full"  # runs/<number>-<name>/
    run_root: str = "runs"
    seed: int = 0
    device: str = "auto"  # auto, cpu, cuda, mps; each process takes its own card
    gpus: str = "auto"  # processes of `python train.py`, one a card: a number, auto = all, 0 = CPU
    threads: int = 0  # CPU threads a process; 0 = all cores shared among this machine's processes

    # data
    data_root: tuple = ("data_openfwi",)  # folders searched for OpenFWI or Kaggle training files
    val_root: tuple = ()  # folders used whole for validation; empty = split data_root
    families: tuple = ()  # names of those to use; empty = all that are found
    split: str = "file"  # file = whole files, as the baseline; share = the last samples of each file
    val_files: int = 2  # files a family for validation (the baseline's fold 0), never over half of them
    val_share: float = 0.1  # share of samples for validation, where a family has one file or split=share
    skip_bad_files: bool = (
        False  # go on without files that cannot be read, saying and counting what is skipped
    )
    percent: tuple = ()  # of the training samples, nested, by seed: 30, or as FlatVel_A:10,Style_B:50
    sample_weights: tuple = ()  # how often families come, as Style_B:2; test_mix = the competition's
    workers: int = 4  # loader threads a rank; each holds a batch
    flip_p: float = 0.5  # probability of the baseline's flip (inexact for the centre source)
    synth_per_family: int = (
        0  # > 0: make this many maps of each family with synth.py where data_root lacks them
    )

    # augmentation of the gathers, on the device: each kind's probability for a sample, and its range
    stretch_p: float = 0.0  # velocity-time scaling: v·c with time t/c, the wavelet restored
    stretch: tuple = (0.9, 1.1)  # of c; each map keeps within 1500...4500 m/s
    shift_p: float = 0.0  # in time
    shift: int = 3  # at most so many samples (ms) either way
    gain_p: float = 0.0  # one factor for the whole gather
    gain: tuple = (0.8, 1.25)
    noise_p: float = 0.0  # Gaussian
    noise_db: tuple = (10, 40)  # signal-to-noise ratio
    noise_coloured: float = 0.5  # share of the noisy samples whose noise lies in the wavelet's band
    noise_spread: float = 0.3  # standard deviation of the logarithm of the traces' noise levels
    shot_drop_p: float = 0.0  # shots set to zero
    shot_drop: int = 1  # at most so many of the five
    receiver_drop_p: float = 0.0  # receivers set to zero
    receiver_drop: float = 0.1  # at most this share of them

    # online simulation: training pairs made while training
    online: float = 0.0  # share of each step's samples that are simulated, with exact mirroring; 0 = off
    online_maps: str = "both"  # new = of `families` (all ten where empty), varied = training maps changed
    online_pairs: int = 4096  # not on CUDA: so many on disk, 0.7 MB each, then they come round again
    online_cache: str = ""  # not on CUDA: their folder; empty = <run_root>/online_cache
    online_workers: int = 1  # not on CUDA: processes a rank that simulate them, one thread each

    # network
    arch: str = "unet"  # unet = the baseline's family, seisnext = ours, inversionnet = the OpenFWI paper's
    mode: str = "full"  # input: full (1000x70), smart_256x72, small_72x72
    backbone: str = "convnext_small.fb_in22k_ft_in1k"  # arch=unet: any timm ConvNeXt, CAFormer, ConvFormer
    pretrained: bool = True  # arch=unet: start from ImageNet weights, fetched by timm
    pretrained_file: str = ""  # local weights of the backbone instead of fetching
    norm: str = "instance"  # encoder norms: instance (baseline), layer (timm's own)
    activation: str = "gelu"  # encoder activations: gelu (baseline), original (timm's own)
    drop_path: float = 0.0  # share of residual branches dropped in training, rising to this with depth
    decoder_channels: tuple = (128, 64, 32)  # coarse to fine
    upsample: str = "transposed"  # transposed, pixelshuffle, nearest
    scse: bool = False  # SCSE attention in the decoder
    skip_convs: bool = False  # two extra convolutions on each skip
    decoder_norm: str = "none"  # none, instance, batch
    out_level: int = 0  # decoder level the head reads, 0 = the finest; others need head=perfect
    fusion: bool = False  # weighted mean of all decoder levels up to out_level
    fusion_weights: tuple = ()  # one a level; empty = learned
    head: str = "crop"  # crop (baseline), perfect (exactly 70x70 from any feature size)
    confidence: bool = False  # predict the own absolute error too
    classify_family: bool = False  # predict the family too
    deep_supervision: bool = False  # a velocity map from every decoder level in training
    bounded: bool = False  # sigmoid onto 1500...4500 m/s instead of the baseline's linear scaling
    input_scaling: str = "none"  # none (baseline), signed_log, time_gain
    width: int = 32  # arch=seisnext: channels of the finest map (deeper ones 3, 6, 8 times)

    # training
    epochs: int = 40
    batch_size: int = 16  # samples a process (a GPU) reads at once
    accumulate: int = 1  # batches a process adds up before each step
    optimizer: str = "adamw"  # adamw, muon = Muon on matrices and kernels, AdamW on the rest
    lr: float = 1e-4  # peak learning rate (baseline users: 1e-4 to 1e-3)
    min_lr: float = 1e-6
    warmup_steps: int = 500  # linear from min_lr to lr
    warmup_epochs: float = 0.0  # more of the same, in epochs
    constant_share: float = 0.0  # share of the steps after warm-up that keep lr; then the cosine
    weight_decay: float = 0.01  # on matrices and kernels only
    clip_norm: float = 3.0  # gradient norm; 0 = off
    ema_decay: float = 0.99  # of the weights that are validated and saved; warmed up
    precision: str = (
        "auto"  # float32, tf32, bfloat16, float16; auto = bfloat16 or float16 on CUDA, else float32
    )
    compile: str = "off"  # off, default, max-autotune: torch.compile of the training forward

    smoothness: float = 0.0  # weight of the prediction's mean absolute difference between neighbours
    smoothness_edge: float = 0.0  # m/s; > 0: differences beyond it cost no more (keeps interfaces sharp)
    family_weights: tuple = ()  # of the loss, as Style_B:2,FlatVel_A:0.5; 1 where not named
    patience: int = 0  # validations without a better one before stopping early; 0 = off
    max_bad_steps: int = 10  # non-finite steps in a row before stopping

    # watching
    log_every: int = 50  # steps
    val_every: int = 1  # epochs
    save_every: int = 1000  # steps between writes of last.pt (besides each validation)
    save_minutes: float = 10.0  # and at the latest after these
    wandb: str = "off"  # off, offline, online: Weights & Biases
    resume: str = ""  # run folder to go on with, or auto = the newest one of this name
    eval_only: bool = False  # validate --ckpt and stop
    dry_run: bool = False  # print configuration, parameters and shapes, and stop
    smoke: bool = False  # three steps, validation, save, reload: does everything work?
    overfit: int = 0  # > 0: train and validate on the first so many samples
    profile: bool = False  # write a Chrome trace of four steps into the run folder
    deterministic: bool = False  # the same bits on every run on CUDA too, slower

    # inference
    ckpt: str = ""  # best.pt, last.pt or a public state dict; infer.py averages several: a.pt,b.pt
    input: str = ""  # a .npy file or a folder of them
    out: str = "submission.csv"
    tta: tuple = ()  # views averaged with the plain one: mirror, noise, scale, stretch; bare = mirror
    tta_weights: tuple = ()  # of the views, as mirror:1,noise:0.5; the others as in tta.py
    ensemble_weights: tuple = ()  # one a checkpoint; empty = those of --use, else equal
    combine: str = "mean"  # how views, and checkpoints, become one map: mean, median, adaptive
    post: tuple = ()  # steps of postprocess.py on the maps, in this order; auto = what --use found to help
    fit: str = ""  # file to write: ensemble weights, statistics and helpful steps, fitted on --truth
    use: str = ""  # such a file, fitted on validation data, to apply
    refine: str = "none"  # against the observed gather: none, feedback, inversion
    refine_rounds: int = 3  # of feedback
    refine_step: float = 0.8  # of feedback: share of the residual put back; halved where misfit grows
    refine_minutes: float = 10.0  # of inversion: at most so many for a gather
    refine_budget: float = 0.0  # minutes for all gathers, those of most expected gain first; 0 = unlimited
    refine_iterations: int = 600  # of inversion: cell by cell, for what searches leave; 0 = searches alone
    misfit: bool = False  # simulate the predictions; misfits into <out>.misfit.csv, label-free quality
    flag_worst: int = 0  # list and draw so many predictions of the greatest log misfit
    figures: str = ""  # folder for figures: best, median and worst of each family; misfit against error
    pseudo: str = ""  # folder for a training root of predictions and their own simulated gathers
    pseudo_misfit: float = 0.3  # predictions of a greater log misfit are left out of it
    pseudo_family: str = "CurveVel_B"  # family they are filed under where no classifier head tells it
    save_maps: str = ""  # folder for <id>.npy, (70, 70) float32 m/s
    truth: str = ""  # folder with the true maps, to score against

    given = frozenset()  # no field: the names that stood on the command line

    def __post_init__(self):
        """Check every field's type; an int may serve for a float, a list for a tuple."""
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), field.type
            if kind is float and type(value) is int:
                value = float(value)
            if kind is tuple and isinstance(value, list):
                value = tuple(value)
            if type(value) is not kind:
                raise ValueError(
                    f"{field.name} = {value!r} is a {type(value).__name__}, expected {kind.__name__}"
                )
            setattr(self, field.name, value)
        _check_choices(self)


# what decides the network: a checkpoint brings its own
NETWORK_FIELDS = (
    *("arch", "mode", "backbone", "norm", "activation", "drop_path", "decoder_channels", "upsample", "scse"),
    *("skip_convs", "decoder_norm", "out_level", "fusion", "fusion_weights", "head", "confidence"),
    *("classify_family", "deep_supervision", "bounded", "input_scaling", "width"),
)
# what a resumed run may change without being another experiment
FREE_FIELDS = (
    *(
        "run_root",
        "device",
        "gpus",
        "threads",
        "workers",
        "batch_size",
        "accumulate",
        "log_every",
        "val_every",
    ),
    *("online_cache", "online_workers"),
    *("save_every", "save_minutes", "wandb", "resume", "eval_only", "dry_run", "profile", "compile"),
    *("skip_bad_files",),
    *("max_bad_steps", "ckpt", "input", "out", "tta", "tta_weights", "ensemble_weights", "combine", "post"),
    *(
        "fit",
        "use",
        "refine",
        "refine_rounds",
        "refine_step",
        "refine_minutes",
        "refine_budget",
        "refine_iterations",
        "misfit",
        "flag_worst",
        "figures",
    ),
    *("pseudo", "pseudo_misfit", "pseudo_family", "save_maps", "truth"),
)

CHOICES = {
    "device": ("auto", "cpu", "cuda", "mps"),
    "split": ("file", "share"),
    "precision": ("auto", "float32", "tf32", "bfloat16", "float16"),
    "compile": ("off", "default", "max-autotune"),
    "optimizer": ("adamw", "muon"),
    "wandb": ("off", "offline", "online"),
    "combine": ("mean", "median", "adaptive"),
    "refine": ("none", "feedback", "inversion"),
    "online_maps": ("new", "varied", "both"),
}
RANGES = ("stretch", "gain", "noise_db")  # lowest and highest value
NUMBERS = ("decoder_channels", "fusion_weights", "ensemble_weights", *RANGES)  # the others hold words
BARE = {"tta": {"true": ("mirror",), "false": ()}}  # sequences that may stand as a switch
BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
POSITIVE = (
    "batch_size",
    "accumulate",
    "epochs",
    "max_bad_steps",
    "save_minutes",
    "log_every",
    "val_every",
    "save_every",
    "lr",
    "online_pairs",
    "online_workers",
)

SEISNEXT = {  # our network, with the options and the rate it was measured with
    "arch": "seisnext",
    "head": "perfect",
    "decoder_norm": "batch",
    "input_scaling": "signed_log",
    "lr": 1e-3,
    "warmup_steps": 50,
    "weight_decay": 0.05,
}
PRESETS = {
    "full": {},
    "seisnext": {"name": "seisnext", **SEISNEXT},
    "demo": {  # simulates, trains and validates in minutes on two CPU cores
        "name": "demo",
        "data_root": ("data_demo",),
        "families": ("FlatVel_A", "CurveVel_A", "FlatFault_A", "CurveFault_A", "Style_A"),
        "synth_per_family": 240,
        "split": "share",
        "workers": 1,
        **SEISNEXT,
        "epochs": 12,
        "batch_size": 8,
        "val_every": 4,
    },
}


def _check_choices(cfg):
    for name, options in CHOICES.items():
        if getattr(cfg, name) not in options:
            raise ValueError(f"--{name}={getattr(cfg, name)}: expected one of {', '.join(options)}")
    for name in POSITIVE:
        if getattr(cfg, name) <= 0:
            raise ValueError(f"--{name}={getattr(cfg, name)}: expected a positive number")
    for name, value in vars(cfg).items():
        if isinstance(value, float | int) and value < 0:
            raise ValueError(f"--{name}={value}: expected 0 or more")
    for name in NUMBERS:
        if not all(isinstance(n, int | float) for n in getattr(cfg, name)):
            raise ValueError(f"{name} = {getattr(cfg, name)}: expected numbers")
    if not cfg.data_root:
        raise ValueError("--data_root: expected at least one folder")
    if not 0 < cfg.val_share < 1:
        raise ValueError(f"--val_share={cfg.val_share}: expected a share between 0 and 1")
    if cfg.gpus != "auto" and not cfg.gpus.isdigit():
        raise ValueError(f"--gpus={cfg.gpus}: expected a number or auto")
    for name in RANGES:
        values = getattr(cfg, name)
        if len(values) != 2 or values[0] > values[1] or (name != "noise_db" and values[0] <= 0):
            raise ValueError(f"--{name}={','.join(map(str, values))}: expected lowest,highest, positive ones")
    if not cfg.stretch[0] <= 1 <= cfg.stretch[1]:
        raise ValueError(f"--stretch={cfg.stretch[0]},{cfg.stretch[1]}: expected a range that holds 1")
    tops = {name: 1 for name in vars(cfg) if name.endswith("_p")} | {"noise_coloured": 1, "online": 0.99}
    tops |= {"shot_drop": 4, "receiver_drop": 0.9, "constant_share": 0.999, "ema_decay": 0.99999}
    for name, top in tops.items():
        if getattr(cfg, name) > top:
            raise ValueError(f"--{name}={getattr(cfg, name)}: expected at most {top}")


def _nearest(word, words, prefix=""):
    match = difflib.get_close_matches(word.lower(), [w.lower() for w in words], 1)
    found = next((w for w in words if match and w.lower() == match[0]), None)
    return f"; did you mean {prefix}{found}?" if found else ""


def _number(name, word):
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(word)
    raise ValueError(f"--{name}: expected numbers divided by commas, got {word!r}")


def _convert(name, text, kind):
    """The words of the command line as a value of the field's type."""
    if kind is bool:
        if text.lower() in BOOLS:
            return BOOLS[text.lower()]
        raise ValueError(f"--{name}={text}: expected true or false")
    if text.lower() in BARE.get(name, ()):
        return BARE[name][text.lower()]
    if kind is tuple:
        words = [w for w in text.split(",") if w]
        return tuple(_number(name, w) for w in words) if name in NUMBERS else tuple(words)
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"--{name}={text}: expected {kind.__name__}, got {text!r}") from None


def parse(argv):
    """Command-line words -> Config. Raises ValueError, one line, for what does not fit."""
    if {"-h", "--help"} & set(argv):
        print(f"{__doc__}\nPresets: {', '.join(PRESETS)}\n\n{inspect.getsource(Config).split('    def ')[0]}")
        raise SystemExit(0)
    kinds = {field.name: field.type for field in dataclasses.fields(Config)}
    values, preset, words = {}, "full", list(argv)
    while words:
        word = words.pop(0)
        name, equals, text = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not word.startswith("--") or (name not in kinds and name != "preset"):
            raise ValueError(f"unknown option {word.partition('=')[0]}{_nearest(name, kinds, '--')}")
        kind = kinds.get(name, str)
        if not equals:
            is_switch = name in BARE and (not words or words[0].startswith("--"))
            if is_switch or kind is bool and (not words or words[0].lower() not in BOOLS):
                text = "true"
            elif words and not words[0].startswith("--"):
                text = words.pop(0)
            else:
                raise ValueError(f"--{name} needs a value: --{name}={kind.__name__}")
        if name == "preset":
            if text not in PRESETS:
                raise ValueError(
                    f"unknown preset {text!r}{_nearest(text, PRESETS)} (all: {', '.join(PRESETS)})"
                )
            preset = text
        else:
            values[name] = _convert(name, text, kind)
    cfg = Config(**{**PRESETS[preset], **values})
    cfg.given = frozenset(values)
    return cfg


def network_config(cfg, checkpoint):
    """`cfg` with the network its checkpoint was trained with (a bare state dict brings none).

    Raises ValueError when the command line asked for another network.
    """
    saved = {name: checkpoint["cfg"][name] for name in NETWORK_FIELDS if name in checkpoint.get("cfg", {})}
    for name, value in saved.items():
        if name in cfg.given and getattr(cfg, name) != value:
            raise ValueError(
                f"{cfg.ckpt}: trained with --{name}={value}, asked for --{name}={getattr(cfg, name)}; "
                f"leave out --{name}, or give another checkpoint"
            )
    return dataclasses.replace(cfg, **saved, pretrained=False)
