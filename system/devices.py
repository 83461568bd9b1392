"""Devices: which one to use, at which precision, and copies to and from it."""

import contextlib
import ctypes
import sys

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
OLD_CARDS = "https://download.pytorch.org/whl/cu126"  # torch builds that include P100 (6.0) and V100 (7.0)
AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}  # other precisions need no autocast


def pick_device(name, local_rank=0):
    """auto, cpu, cuda or mps -> torch.device; raises ValueError if it is missing or cannot be used."""
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
    """Raise ValueError if there is a card that torch cannot use because of its driver, such as an old one."""
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
    # machine code runs on later minor versions, PTX ("compute") on all later cards
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

    auto is the 16-bit format that a CUDA card computes natively, and float32 elsewhere: on CPUs bfloat16 was
    measured to be slower. Raises ValueError for a precision that the device lacks.
    """
    on_cuda = device.type == "cuda"
    has_bfloat16 = on_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto":
        name = ("bfloat16" if has_bfloat16 else "float16") if on_cuda else "float32"
    if name == "tf32" and not on_cuda:
        raise ValueError(f"--precision=tf32 needs CUDA, this is {device.type}; use float32 or bfloat16")
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
    """Copy a CPU tensor to a device, on CUDA without waiting for the work that is queued there."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        # only copies from pinned memory do not wait; on MPS, a copy that does not wait may be corrupt
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class HostCopy:
    """A copy of a tensor on the CPU. On CUDA the copy is queued behind the work given to the card so far.

    `get` waits for the copy, but not for work that was queued after it.
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
    """Keep freed memory for the next step: glibc returns large blocks to the system, and getting them again
    costs a page fault for each page."""
    try:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # only glibc has it
    except (OSError, TypeError):  # on Windows a process has no library of its own
        return
    if mallopt and mallopt(M_MMAP_THRESHOLD, 1 << 30):
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


@contextlib.contextmanager
def settings_restored():
    """Restore torch's and Python's settings at the end: threads, TF32, determinism, the current card."""
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
