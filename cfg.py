"""The configuration: one flat dataclass, edited here or overridden on the command line.

`--name=value` and `--name value` set an option, a bare `--name` switches it on, and `--preset=NAME` starts
from one of `PRESETS`. Explicit options win over the preset, and the preset over the architecture's defaults.

`python cfg.py` prints docs/config.md.
"""

import dataclasses
from dataclasses import dataclass

from options.command_line import asks_for_help, nearest, read_words
from options.fields import Options, Section, check_gpus
from options.help import markdown, print_help, written

# Results that options decide, see `fields_that_decide`.
TRAINING = "training"  # a training run, which may be resumed only with the same options
PREDICTIONS = "predictions"  # the velocity maps of one network, kept by an interrupted infer.py
MAPS = "maps"  # the final velocity maps, kept in the same way

TRAIN, INFER, NETWORK = "train.py", "infer.py", "bench.py network"  # programs, see `parse`

# An option decides the results that its section names, unless it names others.
run = Section("run", "the run and the machine", (TRAIN, INFER))
data = Section("data", "training and validation data", (TRAIN,), (TRAINING,))
augmentation = Section(
    "augmentation", "augmentation of the gathers on the device, off by default", (TRAIN,), (TRAINING,)
)
simulation = Section("online", "training pairs simulated while training", (TRAIN,), (TRAINING,))
network = Section(
    "network",
    "the network; a checkpoint brings its own options",
    (TRAIN, INFER, NETWORK),
    (TRAINING, PREDICTIONS, MAPS),
)
training = Section("training", "loss, optimizer and schedule", (TRAIN,), (TRAINING,))
watching = Section("watching", "logging, saving and quick checks", (TRAIN,))
inference = Section("inference", "prediction, refining and reports", (INFER,), (MAPS,))


@dataclass
class Config(Options):
    """Everything a run depends on. Sequences are written `--families=FlatVel_A,Style_B`."""

    # ------------------------------------------------------------------------------------------------- run
    name: str = run("baseline", "run folder: runs/<number>-<name>/", programs=(TRAIN,))
    run_root: str = run("runs", "folder of the run folders", programs=(TRAIN,), path=True)
    seed: int = run(
        0, "random seed of weights, sample order and augmentation", programs=(TRAIN,), decides=(TRAINING,)
    )
    device: str = run(
        "auto",
        "auto, cpu, cuda, mps; each process takes its own card",
        choices=("auto", "cpu", "cuda", "mps"),
    )
    gpus: str = run("auto", "CUDA cards, one process for each: auto = all, or a number")
    threads: int = run(
        0,
        "CPU threads of each process; 0 = the machine's cores, shared among processes",
        programs=(TRAIN, INFER, NETWORK),
        most=4096,
    )
    workers: int = run(4, "threads that read ahead; each holds a batch", most=1024)
    batch_size: int = run(
        16,
        "samples that each process (GPU) takes at once",
        programs=(TRAIN, INFER, NETWORK),
        above=0,
        most=10**6,
    )
    precision: str = run(
        "auto",
        "float32, tf32, bfloat16, float16; auto = 16 bits on cards that compute them, else float32",
        choices=("auto", "float32", "tf32", "bfloat16", "float16"),
        decides=(TRAINING, PREDICTIONS, MAPS),
    )
    compile: str = run(
        "off", "off, default, max-autotune: torch.compile", choices=("off", "default", "max-autotune")
    )

    # ------------------------------------------------------------------------------------------------ data
    data_root: tuple = data(
        ("data_openfwi",), "folders searched for OpenFWI or Kaggle training files", path=True
    )
    val_root: tuple = data((), "folders used for validation only; none = split data_root", path=True)
    families: tuple = data((), "families to use; none = all found")
    split: str = data(
        "file",
        "file = validate on whole files, as the baseline does; share = on the last samples of each file",
        choices=("file", "share"),
    )
    val_files: int = data(2, "validation files of each family, at most half of its files")
    val_share: float = data(
        0.1,
        "share of the samples to validate on, with split=share or a single file of a family",
        above=0,
        most=0.999,
    )
    skip_bad_files: bool = data(
        False, "continue without files that cannot be read, and count them", decides=()
    )
    percent: tuple = data((), "percentage of the training samples to use: 30, or FlatVel_A:10,Style_B:50")
    sample_weights: tuple = data((), "how often families are drawn: Style_B:2; test_mix = the competition's")
    flip_p: float = data(
        0.5, "probability of the baseline's flip, which is not exact for the centre source", most=1
    )
    synth_per_family: int = data(
        0,
        "> 0: first make this many maps of each family in data_root, as synth.py does, if they are missing",
        most=10**6,
    )

    # ---------------------------------------------------------------------------------------- augmentation
    stretch_p: float = augmentation(
        0.0, "probability of multiplying velocities and dividing times by c", most=1
    )
    stretch: tuple = augmentation(
        (0.9, 1.1), "range of c; maps stay within 1500 to 4500 m/s", items=float, above=0
    )
    shift_p: float = augmentation(0.0, "probability of a shift in time", most=1)
    shift: int = augmentation(3, "largest shift in either direction, in samples (ms)", most=999)
    gain_p: float = augmentation(0.0, "probability of multiplying the whole gather by a factor", most=1)
    gain: tuple = augmentation((0.8, 1.25), "range of the factor", items=float, above=0)
    noise_p: float = augmentation(0.0, "probability of Gaussian noise", most=1)
    noise_db: tuple = augmentation(
        (10, 40), "range of the signal-to-noise ratio, dB", items=float, least=-200
    )
    noise_coloured: float = augmentation(
        0.5, "share of noisy samples with noise in the wavelet's band", most=1
    )
    noise_spread: float = augmentation(
        0.3, "standard deviation of the logarithm of the traces' noise levels", most=10
    )
    shot_drop_p: float = augmentation(0.0, "probability of setting shots to zero", most=1)
    shot_drop: int = augmentation(1, "largest number of shots set to zero, of five", most=4)
    receiver_drop_p: float = augmentation(0.0, "probability of setting receivers to zero", most=1)
    receiver_drop: float = augmentation(0.1, "largest share of receivers set to zero", most=0.9)

    # ---------------------------------------------------------------------------------------------- online
    online: float = simulation(0.0, "share of each step's samples that are simulated; 0 = off", most=0.99)
    online_maps: str = simulation(
        "both",
        "new = maps of `families`, varied = training maps changed, both",
        choices=("new", "varied", "both"),
    )
    online_pairs: int = simulation(
        4096,
        "without CUDA: pairs kept on disk, 0.7 MB each, which are used in turn",
        above=0,
        most=10**7,
    )
    online_cache: str = simulation(
        "", "without CUDA: folder of these pairs; none = <run_root>/online_cache", decides=(), path=True
    )
    online_workers: int = simulation(
        1,
        "without CUDA: simulating processes of each rank, with one thread each",
        above=0,
        most=1024,
        decides=(),
    )

    # --------------------------------------------------------------------------------------------- network
    arch: str = network(
        "unet", "unet = the baseline's family, seisnext = ours, inversionnet = the OpenFWI paper's"
    )
    mode: str = network("full", "input: full (1000x70), smart_256x72, small_72x72")
    backbone: str = network(
        "convnext_small.fb_in22k_ft_in1k", "unet: any timm ConvNeXt, ConvNeXtV2, CAFormer or ConvFormer"
    )
    pretrained: bool | str = network(
        True, "unet: start from ImageNet weights: true = timm's, false, or a file", decides=(), path=True
    )
    norm: str = network("instance", "encoder norms: instance (baseline), layer (timm's own)")
    activation: str = network("gelu", "encoder activations: gelu (baseline), original (timm's own)")
    drop_path: float = network(
        0.0, "share of residual branches dropped in training at the deepest stage; less before", most=0.99
    )
    decoder_channels: tuple = network((128, 64, 32), "decoder widths, coarse to fine", items=int, most=1024)
    upsample: str = network("transposed", "transposed, pixelshuffle, nearest")
    scse: bool = network(False, "SCSE attention in the decoder")
    skip_convs: bool = network(False, "two extra convolutions on each skip connection")
    decoder_norm: str = network("none", "none, instance, batch")
    out_level: int = network(0, "decoder level that the head reads; 0 = the finest, others need head=perfect")
    fusion: bool = network(False, "weighted mean of all decoder levels up to out_level")
    fusion_weights: tuple = network((), "weight of each level; none = learned", items=float)
    head: str = network("crop", "crop (baseline), perfect (exactly 70x70 from any feature size)")
    confidence: bool = network(False, "also predict the error of each cell")
    classify_family: bool = network(False, "also predict the family")
    deep_supervision: bool = network(False, "a velocity map from every decoder level in training")
    bounded: bool = network(False, "sigmoid onto 1500 to 4500 m/s instead of the baseline's linear scaling")
    input_scaling: str = network("none", "none (baseline), signed_log, time_gain")
    width: int = network(
        32, "seisnext: channels at the finest level; deeper levels have 3, 6 and 8 times as many", most=256
    )

    # -------------------------------------------------------------------------------------------- training
    epochs: int = training(40, "passes over the training samples", above=0)
    accumulate: int = training(1, "batches whose gradients are added for each step", above=0, decides=())
    optimizer: str = training(
        "adamw", "adamw, muon = Muon on matrices and kernels, AdamW on the rest", choices=("adamw", "muon")
    )
    lr: float = training(1e-4, "peak learning rate; users of the baseline took 1e-4 to 1e-3", above=0)
    min_lr: float = training(1e-6, "learning rate at the start of the warm-up and at the end")
    warmup_steps: int = training(500, "steps of linear rise from min_lr to lr")
    constant_share: float = training(
        0.0, "share of the steps after warm-up that keep lr, before the cosine", most=0.999
    )
    weight_decay: float = training(0.01, "on matrices and kernels only")
    clip_norm: float = training(3.0, "largest gradient norm; 0 = no clipping")
    ema_decay: float = training(
        0.99, "of the averaged weights, which are validated and saved; warmed up", most=0.99999
    )
    smoothness: float = training(
        0.0, "weight of the prediction's mean absolute difference between neighbouring cells"
    )
    smoothness_edge: float = training(
        0.0, "m/s; > 0: larger differences cost no more, which keeps interfaces sharp"
    )
    family_weights: tuple = training((), "of the loss: Style_B:2,FlatVel_A:0.5; 1 where not named")
    patience: int = training(0, "stop after this many validations without improvement; 0 = off")
    max_bad_steps: int = training(
        10, "stop after this many steps in a row that are not finite", above=0, decides=()
    )

    # -------------------------------------------------------------------------------------------- watching
    log_every: int = watching(50, "steps between log lines", above=0)
    val_every: int = watching(1, "epochs between validations", above=0)
    save_minutes: float = watching(
        10.0, "minutes between writes of last.pt, which each validation writes too; 0 = every step"
    )
    wandb: str = watching(
        "off", "Weights & Biases: off, offline, online", choices=("off", "offline", "online")
    )
    resume: str = watching("", "run folder to continue; auto = the newest of this name, if any", path=True)
    eval_only: bool = watching(False, "validate --ckpt and stop")
    dry_run: bool = watching(False, "print configuration, parameters and shapes, and stop")
    smoke: bool = watching(
        False, "check that all works: three steps, validation, saving, reloading", decides=(TRAINING,)
    )
    overfit: int = watching(0, "> 0: train and validate on this many samples", decides=(TRAINING,))
    profile: bool = watching(False, "write a Chrome trace of four steps into the run folder")
    deterministic: bool = watching(False, "the same bits in every run on CUDA, slower", decides=(TRAINING,))

    # ------------------------------------------------------------------------------------------- inference
    ckpt: str = inference(
        "",
        "best.pt, last.pt or others' weights; infer.py: also several, a.pt,b.pt; none = those in weights/",
        programs=(TRAIN, INFER),
        decides=(),
        path=True,
    )
    input: str = inference("", "a .npy file of gathers, or a folder of them", decides=(), path=True)
    out: str = inference("submission.csv", "the competition's CSV of the final maps", decides=(), path=True)
    tta: tuple = inference(
        (),
        "views joined with the plain one: mirror, noise, scale, stretch; with other weights than "
        "theirs as mirror:1,noise:0.5; bare = mirror",
        bare=("mirror",),
        decides=(PREDICTIONS, MAPS),
    )
    ensemble_weights: tuple = inference(
        (), "a weight for each checkpoint; none = those of --use, else equal", items=float
    )
    combine: str = inference(
        "mean",
        "how views and checkpoints are joined: mean, median, adaptive",
        choices=("mean", "median", "adaptive"),
        decides=(PREDICTIONS, MAPS),
    )
    post: tuple = inference((), "steps of postprocess.py in this order; auto = those that helped in --use")
    fit: str = inference(
        "",
        "file to write, with ensemble weights, statistics and helpful steps fitted to --truth",
        decides=(),
        path=True,
    )
    use: str = inference("", "file of --fit to apply, fitted on validation data", decides=(), path=True)
    refine: str = inference(
        "none",
        "how to improve maps against the observed gather: none, feedback, inversion",
    )
    refine_rounds: int = inference(3, "rounds of feedback", most=1000)
    refine_step: float = inference(
        0.8, "feedback: share of the residual that is subtracted; halved when the misfit grows", most=10
    )
    refine_minutes: float = inference(10.0, "inversion: maximum minutes for each gather")
    refine_budget: float = inference(
        0.0, "inversion: minutes for all gathers, largest expected gain first; 0 = no limit", decides=()
    )
    refine_iterations: int = inference(
        40, "inversion: most steps cell by cell for gathers that no search explains; 0 = none"
    )
    misfit: int = inference(
        0,
        "> 0: simulate the final maps, write their misfits to <out>.misfit.csv, list and draw so many of the "
        "worst; bare = 20",
        bare=20,
        decides=(),
    )
    figures: str = inference(
        "",
        "folder for figures: best, median and worst of each family; misfit against error",
        decides=(),
        path=True,
    )
    pseudo: str = inference(
        "", "folder for a training set made of predictions and their simulated gathers", decides=(), path=True
    )
    pseudo_misfit: float = inference(0.3, "pseudo: keep predictions up to this log misfit", decides=())
    pseudo_family: str = inference(
        "CurveVel_B", "pseudo: family of maps if the network does not recognise it", decides=()
    )
    save_maps: str = inference("", "folder for <id>.npy, (70, 70) float32 m/s", decides=(), path=True)
    truth: str = inference("", "folder of the true maps, to score against", decides=(), path=True)

    given = frozenset()  # not a field: the names of the options given on the command line

    def __post_init__(self):
        """Check types and limits; raises ValueError, one line, for the first that is wrong."""
        super().__post_init__()
        if not self.data_root:
            raise ValueError("--data_root: expected at least one folder")
        if self.gpus == "0":
            raise ValueError("--gpus=0 is gone; write --device=cpu")
        check_gpus(self.gpus)
        for name in ("stretch", "gain", "noise_db"):
            values = getattr(self, name)
            if len(values) != 2 or values[0] > values[1]:
                raise ValueError(f"--{name}={','.join(map(str, values))}: expected lowest,highest")
        if not self.stretch[0] <= 1 <= self.stretch[1]:
            raise ValueError(f"--stretch={self.stretch[0]},{self.stretch[1]}: expected a range that holds 1")


def fields_that_decide(result):
    """Names of the options on which a result depends: TRAINING, PREDICTIONS or MAPS.

    What is kept of an interrupted run may only be used again where all of these are the same. Options that
    name files decide by the files' contents: compare these as well.
    """
    assert result in (TRAINING, PREDICTIONS, MAPS), result
    return tuple(f.name for f in dataclasses.fields(Config) if result in f.metadata["decides"])


# What decides the network itself: a checkpoint brings these along.
NETWORK_FIELDS = tuple(
    f.name
    for f in dataclasses.fields(Config)
    if f.metadata["section"] is network and PREDICTIONS in f.metadata["decides"]
)

ARCHITECTURES = {  # defaults of an architecture
    "seisnext": {  # the options and the rate it was measured with
        "name": "seisnext",
        "head": "perfect",
        "decoder_norm": "batch",
        "input_scaling": "signed_log",
        "lr": 1e-3,
        "warmup_steps": 50,
        "weight_decay": 0.05,
    },
    "inversionnet": {"name": "inversionnet"},
}
PRESETS = {
    "baseline": {},
    "seisnext": {"arch": "seisnext"},
    "demo": {  # simulates, trains and validates in minutes on two CPU cores
        "name": "demo",
        "data_root": ("data_demo",),
        "families": ("FlatVel_A", "CurveVel_A", "FlatFault_A", "CurveFault_A", "Style_A"),
        "synth_per_family": 240,
        "split": "share",
        "workers": 1,
        "arch": "seisnext",
        "epochs": 12,
        "batch_size": 8,
        "val_every": 4,
    },
}
GONE = {  # former options: what to write instead
    "flag_worst": "--misfit=N, which writes all misfits and lists and draws the N worst",
    "pretrained_file": "--pretrained=PATH",
    "tta_weights": "--tta=mirror:1,noise:0.5",
    "warmup_epochs": "--warmup_steps=N",
    "save_every": "--save_minutes=M; 0 saves after every step",
}


def parse(argv, program=TRAIN, options=Config):
    """Command-line words -> Config. Raises ValueError, one line, for words that do not fit.

    program: whose options `--help` prints. options: Config, or one of its own with more fields.
    """
    if asks_for_help(argv):
        how = __doc__.split("\n\n")[1]
        print_help(options, f"The options of `python {program}`.\n\n{how}", program, PRESETS)
        raise SystemExit(0)
    values = read_words(argv, options, extra=("preset",), gone=GONE)
    preset = values.pop("preset", "baseline")
    if preset not in PRESETS:
        hint = "; it is called baseline now" if preset == "full" else nearest(preset, PRESETS)
        raise ValueError(f"unknown preset {preset!r}{hint} (all: {', '.join(PRESETS)})")
    chosen = PRESETS[preset] | values
    cfg = options(**(ARCHITECTURES.get(chosen.get("arch"), {}) | chosen))
    cfg.given = frozenset(values)
    return cfg


def network_config(cfg, checkpoint):
    """`cfg` with the network its checkpoint was trained with (a bare state dict brings none).

    Raises ValueError when the command line asked for another network, and for damaged options.
    """
    options = checkpoint.get("cfg") or {}
    if not isinstance(options, dict):
        raise ValueError(
            f"{cfg.ckpt}: its options are a {type(options).__name__}, expected a dictionary; it is damaged"
        )
    saved = {name: options[name] for name in NETWORK_FIELDS if name in options}
    brought = ARCHITECTURES.get(str(saved.get("arch")), {})
    brought = {name: brought[name] for name in NETWORK_FIELDS if name in brought and name not in cfg.given}
    missing = {name: value for name, value in brought.items() if name not in saved}
    if missing and len(missing) < len(
        brought
    ):  # saved when `arch` had no defaults; the weights do not show which
        now, before = (
            " ".join(f"--{name}={written(value)}" for name, value in values.items())
            for values in (missing, {name: getattr(Config, name) for name in missing})
        )
        raise ValueError(
            f"{cfg.ckpt}: its options leave out {', '.join(missing)}; add what it was trained with: "
            f"--arch={saved['arch']} means {now} now and meant {before} before"
        )
    try:
        mine = dataclasses.replace(cfg, **(brought | saved), pretrained=False)
    except ValueError as error:
        raise ValueError(f"{cfg.ckpt}: its options do not fit: {error}") from None
    for name in saved:
        if name in cfg.given and getattr(cfg, name) != getattr(mine, name):
            raise ValueError(
                f"{cfg.ckpt}: trained with --{name}={written(getattr(mine, name))}, "
                f"asked for --{name}={written(getattr(cfg, name))}; "
                f"leave out --{name}, or give another checkpoint"
            )
    return mine


if __name__ == "__main__":
    print(markdown(Config, PRESETS, ARCHITECTURES), end="")
