"""The device interface: allocate an arena, copy from the host asynchronously, order copies and compute, measure."""

from __future__ import annotations

from runtime.devices.base import Device, Measurement, open_device

__all__ = ["Device", "Measurement", "open_device"]
