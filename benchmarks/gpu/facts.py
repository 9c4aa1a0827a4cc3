"""Section `facts`: what the machine has, and the ceilings that the other figures are read against."""

from __future__ import annotations

import importlib.util
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks.gpu.clock import median_seconds
from benchmarks.gpu.section import Conditions, Report

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "triton", "liger_kernel", "flash_attn")


def run(conditions: Conditions, report: Report) -> None:
    """Names and versions, then copy, product and launch rates."""
    device = conditions.device
    report.figure("device", device_name(device))
    report.figure("driver", driver())
    report.figure("python", platform.python_version())
    for package in PACKAGES:
        report.figure(package, installed(package) or "not installed")
    report.figure("torch varlen attention", importlib.util.find_spec("torch.nn.attention.varlen") is not None)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        report.figure("memory", properties.total_memory / 2**30, "GiB")
        report.figure("capability", f"{properties.major}.{properties.minor}")
    small = conditions.tiny or device.type == "cpu"
    with report.attempt("copy"):
        report.figure("copy", copy_rate(device, 2**24 if small else 2**32) / 1e9, "GB/s, read and written")
    for rows, inner, columns in ((256, 256, 256),) if small else ((8192, 8192, 8192), (2048, 4096, 14336)):
        with report.attempt("bf16 product"):
            rate = product_rate(device, rows, inner, columns) / 1e12
            report.figure(f"bf16 product {rows} × {inner} × {columns}", rate, "TFLOP/s")
    report.figure(
        "launch", launch_seconds(device, 100 if small else 5000) * 1e6, "µs of the host, one kernel"
    )


def device_name(device: torch.device) -> str:
    """The card's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def driver() -> str:
    """The driver's version, as nvidia-smi says."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "none"
    return done.stdout.strip().splitlines()[0]


def installed(package: str) -> str | None:
    """A package's version; None where it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def copy_rate(device: torch.device, size: int) -> float:
    """Bytes read and written a second by a copy on the device."""
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * size / median_seconds(lambda: target.copy_(source), device)


def product_rate(device: torch.device, rows: int, inner: int, columns: int) -> float:
    """Floating-point operations a second of [rows, inner] · [inner, columns] in bf16, on random values."""
    a = torch.randn(rows, inner, device=device, dtype=torch.bfloat16)
    b = torch.randn(columns, inner, device=device, dtype=torch.bfloat16)
    return 2 * rows * inner * columns / median_seconds(lambda: a @ b.t(), device)


def launch_seconds(device: torch.device, count: int) -> float:
    """What one small kernel costs the host, on average."""
    value = torch.zeros(1, device=device)
    for _ in range(10):
        value.add_(1)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(count):
        value.add_(1)
    return (time.perf_counter() - started) / count
