"""Devices by name: their memory, and how fast they multiply matrices."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DeviceKind:
    """A kind of device.

    Attributes:
        name: Its name.
        memory_gib: Memory that a process can use, in GiB.
        peak_flops: Dense bfloat16 operations per second by the data sheet; None if it is not known.
        is_cuda: Whether it is a CUDA device.
    """

    name: str
    memory_gib: float
    peak_flops: float | None = None
    is_cuda: bool = True


# Memory as the driver reports it, rates as NVIDIA's data sheets give them without sparsity.
DEVICE_KINDS = {
    kind.name: kind
    for kind in (
        DeviceKind("b200", 178.0, 2250e12),
        DeviceKind("h200", 139.8, 989e12),
        DeviceKind("h100", 79.1, 989e12),
        DeviceKind("a100-80", 79.1, 312e12),
        DeviceKind("a100-40", 39.4, 312e12),
        DeviceKind("l40s", 44.4, 362e12),
        DeviceKind("a6000", 47.4, 155e12),
        DeviceKind("l4", 22.0, 121e12),
        DeviceKind("4090", 23.5, 165e12),
        DeviceKind("3090", 23.6, 71e12),
    )
}


MAX_GB = 1000  # of one device; larger numbers are names, such as 4080


def parse_device(text: str) -> DeviceKind:
    """Return the device of a name, or a CUDA device with so many GB.

    Raises:
        ValueError: It is neither.
    """
    if text.lower() in DEVICE_KINDS:
        return DEVICE_KINDS[text.lower()]
    try:
        size = float(text.lower().removesuffix("gb"))
    except ValueError:
        size = 0.0
    if not 0 < size <= MAX_GB:
        raise ValueError(
            f"--device: expected {', '.join(DEVICE_KINDS)} or a size in GB such as 24 (at most {MAX_GB}), got {text!r}."
        )
    return DeviceKind(f"{size:g} GB", size * 1e9 / 2**30)
