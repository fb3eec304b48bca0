"""Accelerators, by their vendors' data sheets (docs/plan.md lists them)."""

from __future__ import annotations

from typing import NamedTuple


class Device(NamedTuple):
    flops: float  # dense bfloat16, per second
    bandwidth: float  # of its memory, bytes per second
    memory: float  # bytes
    link: float  # to the other devices of its node, bytes per second in one direction


DEVICES = {
    "A100": Device(312e12, 2.039e12, 80e9, 300e9),
    "H100": Device(989.4e12, 3.35e12, 80e9, 450e9),
    "H800": Device(989.4e12, 3.35e12, 80e9, 200e9),
    "H200": Device(989.4e12, 4.8e12, 141e9, 450e9),
    "B200": Device(2250e12, 8.0e12, 180e9, 900e9),
    "MI300X": Device(1307.4e12, 5.3e12, 192e9, 448e9),
}
NODE = 8  # devices that the fast link joins, in all of these
NETWORK = 50e9  # bytes per second and device between nodes: a 400 Gb/s adapter each
