"""GPUs: memory and dense peak speed, from their vendors' data sheets.

    find("h200")                                        # what `python -m maws plan --gpu h200` plans for
    peak_flops("NVIDIA H100 80GB HBM3", "bf16")         # 989e12, from torch.cuda.get_device_name(); None: not known

Dense: numbers "with sparsity" are twice those below. FLOP/s count a multiply and an add as two.
"""

import re
from dataclasses import dataclass

from maws.config import ConfigError, nearest

GB, GIB = 10**9, 2**30
PRECISIONS = ("bf16", "tf32", "fp32")  # of matrix products; tf32 is fp32 where torch is allowed to round its inputs


@dataclass(frozen=True)
class Device:
    """One kind of GPU. Speeds in TFLOP/s, memory in GB (10^9 bytes)."""

    name: str
    memory: float
    bf16: float
    tf32: float
    fp32: float
    pattern: str  # of what torch.cuda.get_device_name() says, in small letters
    source: str  # the vendor's document

    @property
    def memory_bytes(self) -> int:
        return round(self.memory * GB)

    def peak(self, precision: str) -> float:
        """FLOP/s of matrix products."""
        return {"bf16": self.bf16, "tf32": self.tf32, "fp32": self.fp32}[precision] * 1e12


# The first pattern that matches counts, so that special forms stand before the plain name.
DEVICES = (
    Device("b200", 180, 2250, 1125, 75, r"\bb200", "NVIDIA DGX B200 data sheet, an eighth of the system"),
    Device("gh200", 96, 989, 494.5, 67, r"gh200", "NVIDIA GH200 data sheet, HBM3"),
    Device("h200-nvl", 141, 835.5, 417.5, 60, r"h200 nvl", "NVIDIA H200 data sheet"),
    Device("h200", 141, 989, 494.5, 67, r"h200", "NVIDIA H200 data sheet, SXM"),
    Device("h100-nvl", 94, 835.5, 417.5, 60, r"h100 nvl", "NVIDIA H100 data sheet"),
    Device("h100-pcie", 80, 756, 378, 51, r"h100 pcie", "NVIDIA H100 data sheet of 2022"),
    Device("h100", 80, 989, 494.5, 67, r"h100", "NVIDIA H100 data sheet, SXM"),
    Device("a100-40gb", 40, 312, 156, 19.5, r"a100.*40gb", "NVIDIA A100 data sheet"),
    Device("a100", 80, 312, 156, 19.5, r"a100", "NVIDIA A100 data sheet, 80 GB"),
    Device("l40s", 48, 362.05, 183, 91.6, r"l40s", "NVIDIA L40S data sheet"),
    Device("l40", 48, 181.05, 90.5, 90.5, r"l40", "NVIDIA L40 data sheet"),
    Device("l4", 24, 121, 60, 30.3, r"\bl4\b", "NVIDIA L4 data sheet"),
    Device("a40", 48, 149.7, 74.8, 37.4, r"\ba40\b", "NVIDIA A40 data sheet"),
    Device("a10", 24, 125, 62.5, 31.2, r"\ba10\b", "NVIDIA A10 data sheet"),
    Device("rtx-a6000", 48, 154.8, 77.4, 38.7, r"rtx a6000", "NVIDIA RTX A6000 data sheet"),
    Device("rtx-4090", 24, 165.2, 82.6, 82.6, r"rtx 4090", "NVIDIA Ada GPU architecture white paper, appendix A"),
    Device("rtx-3090", 24, 71, 35.6, 35.6, r"rtx 3090", "NVIDIA GA102 architecture white paper, fp32 accumulate"),
    Device("mi300x", 192, 1307.4, 653.7, 163.4, r"mi300x", "AMD Instinct MI300X data sheet"),
    Device("mi250x", 64, 191.5, 47.9, 47.9, r"mi250x", "AMD Instinct MI250X data sheet, one of its two dies"),
)  # fmt: skip


def find(name: str) -> Device:
    """A device by its name here. Raises ConfigError for an unknown one, with the nearest."""
    for device in DEVICES:
        if device.name == name.lower():
            return device
    raise ConfigError(
        f"--gpu {name} is not known; {nearest(name.lower(), [d.name for d in DEVICES])} "
        f"For another one give --memory (such as 80GB) and --tflops"
    )


def recognise(reported: str) -> Device | None:
    """The device that torch.cuda.get_device_name() means; None when it is in no data sheet that was read here."""
    return next((d for d in DEVICES if re.search(d.pattern, reported.lower())), None)


def peak_flops(reported: str, precision: str) -> float | None:
    """Dense FLOP/s of the device that torch.cuda.get_device_name() reports, for `precision`; None: not known."""
    device = recognise(reported)
    return device.peak(precision) if device else None


def training_precision(precision: str) -> str:
    """What matrix products of a run in `precision` (bf16, fp32) are done in: fp32 is tf32 where torch is told so."""
    if precision != "fp32":
        return precision
    import torch

    return "fp32" if torch.get_float32_matmul_precision() == "highest" else "tf32"
