"""Devices: which one to use, at which precision, and copies to and from it."""

import contextlib
import ctypes
import sys

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
OLD_CARDS = "https://download.pytorch.org/whl/cu126"  # torch for P100 (6.0) and V100 (7.0), too
AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}  # the others compute as they are


def pick_device(name, local_rank=0):
    """auto, cpu, cuda or mps -> torch.device; raises ValueError where it is not there, or cannot be used."""
    if name in ("auto", "cuda"):
        check_driver()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        n_cards = torch.cuda.device_count()
        if local_rank >= n_cards:
            raise ValueError(
                f"process {local_rank + 1} of this machine has no card: {n_cards} CUDA devices found; "
                f"start at most {n_cards} processes, or use --device=cpu"
            )
        check_card(local_rank)
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device=mps: no MPS device here; use --device=auto")
    return torch.device(name)


def check_driver():
    """Raise ValueError where there is a card that its driver keeps torch from using, such as one too old."""
    if torch.version.cuda is None or torch.cuda.is_available():
        return
    try:
        torch.cuda.init()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        if "no NVIDIA driver" not in reason and "No CUDA GPUs" not in reason:
            raise ValueError(
                f"the CUDA card cannot be used: {reason.partition('. ')[0]}; update its driver, install a "
                f"torch for an older CUDA than {torch.version.cuda}, or use --device=cpu"
            ) from None


def check_card(index):
    """Raise ValueError unless this torch holds code that card `index` can run."""
    card = torch.cuda.get_device_capability(index)
    names = [arch.rstrip("af").split("_") for arch in torch.cuda.get_arch_list()]  # as sm_90a, compute_120
    built = [(kind, (int(number[:-1]), int(number[-1]))) for kind, number in names]
    # machine code serves later minor versions, PTX ("compute") all later cards
    if not built or any(c <= card and (kind == "compute" or c[0] == card[0]) for kind, c in built):
        return
    remedy = "a newer torch"
    if card < min(capability for _, capability in built):
        remedy = f"a torch for older cards: pip install torch torchvision --index-url {OLD_CARDS}"
    raise ValueError(
        f"{torch.cuda.get_device_name(index)} has compute capability {card[0]}.{card[1]}, and torch "
        f"{torch.__version__} is built for {', '.join(f'{a}.{b}' for _, (a, b) in built)}; "
        f"install {remedy}, or use --device=cpu"
    )


def pick_precision(name, device):
    """Resolve `auto` and switch TF32: float32, tf32, bfloat16 or float16.

    auto is the 16 bits a CUDA card computes natively, and float32 elsewhere: on
    CPUs bfloat16 was measured slower. Raises ValueError for what the device lacks.
    """
    on_cuda = device.type == "cuda"
    has_bfloat16 = on_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto":
        name = ("bfloat16" if has_bfloat16 else "float16") if on_cuda else "float32"
    if name == "tf32" and not on_cuda:
        raise ValueError(f"--precision=tf32 is CUDA's, this is {device.type}; use float32 or bfloat16")
    if name == "bfloat16" and on_cuda and not has_bfloat16:
        raise ValueError("--precision=bfloat16: this card only emulates it; use float16")
    if name in AUTOCAST:
        try:
            with torch.autocast(device.type, dtype=AUTOCAST[name]):
                torch.nn.functional.conv2d(*torch.ones(2, 1, 1, 3, 3, device=device))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"--precision={name} does not work on {device.type} here ({reason}); use float32"
            ) from None
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name == "tf32"
    return name


def to_device(tensor, device):
    """A CPU tensor on a device, without waiting for what is queued on a CUDA card."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        # from memory that is not pinned, the copy would wait; on MPS, one that does not wait may be corrupt
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class HostCopy:
    """A tensor's values for the CPU: copied from a card when the work queued so far is done.

    `get` waits for that, not for what is queued after the copy.
    """

    def __init__(self, tensor):
        self.values, self.event = tensor, None
        if tensor.device.type == "cuda":
            self.values = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self.values.copy_(tensor, non_blocking=True)
            self.event = torch.cuda.current_stream(tensor.device).record_event()

    def get(self):
        if self.event is not None:
            self.event.synchronize()
        return self.values


def keep_memory():
    """Keep freed memory for the next step; glibc gives large blocks back, and each page costs a fault."""
    try:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's alone
    except (OSError, TypeError):  # Windows has no library of the process itself
        return
    if mallopt and mallopt(M_MMAP_THRESHOLD, 1 << 30):
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


@contextlib.contextmanager
def settings_restored():
    """Leave torch and Python set as they were: threads, TF32, determinism, the current card."""
    card = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    n_threads, switch_s = torch.get_num_threads(), sys.getswitchinterval()
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)
        sys.setswitchinterval(switch_s)
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
        torch.use_deterministic_algorithms(deterministic)
        if card is not None:
            torch.cuda.set_device(card)
