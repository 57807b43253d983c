"""What the planner needs to know of a device: its last-level cache and its smallest good chunk."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

from elmo_compile.errors import OptionError
from elmo_compile.planner.shape import DeviceKind

MIB = 1 << 20
CPU_CACHE_FALLBACK = 32 * MIB
CUDA_CACHE_FALLBACK = 40 * MIB
"""Where the caller cannot say: an A100's L2."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceLimits:
    """Limits by which a chunk is chosen."""

    kind: DeviceKind
    cache_bytes: int
    """Last-level cache: L3 of a CPU, L2 of a GPU."""
    min_chunk: int
    """Outputs per chunk below which the matrix units starve."""
    multiple: int
    """Chunks are multiples of this."""

    @property
    def working_set(self) -> int:
        """Bytes one chunk may keep in cache: half, since others share it."""
        return self.cache_bytes // 2


def limits_for(kind: DeviceKind, cache_bytes: int | None = None) -> DeviceLimits:
    """The limits of a device.

    Args:
        kind: "cpu" or "cuda".
        cache_bytes: its last-level cache; None: asked of the system (CPU) or a typical value.

    Raises:
        OptionError: another kind of device.
    """
    if kind == "cpu":
        cache = cache_bytes or cpu_cache_bytes()
        return DeviceLimits(kind=kind, cache_bytes=cache, min_chunk=1024, multiple=128)
    if kind == "cuda":
        cache = cache_bytes or CUDA_CACHE_FALLBACK
        return DeviceLimits(kind=kind, cache_bytes=cache, min_chunk=4096, multiple=128)
    raise OptionError(f"no limits are known for device {kind!r}; accepted: 'cpu', 'cuda'.")


@functools.cache
def cpu_cache_bytes() -> int:
    """Size of CPU 0's last-level cache in bytes, as the kernel tells it; 32 MiB if it does not."""
    found: dict[int, int] = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level = int((index / "level").read_text())
            found[level] = max(found.get(level, 0), _kernel_size((index / "size").read_text()))
        except (OSError, ValueError):
            continue  # A cache without a size (some virtual machines) says nothing.
    return found.get(3, 0) or CPU_CACHE_FALLBACK


def _kernel_size(text: str) -> int:
    """Bytes of sysfs's "32768K"."""
    text = text.strip()
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return int(text[:-1]) * units[text[-1]] if text[-1:] in units else int(text)
