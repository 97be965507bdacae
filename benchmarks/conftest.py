"""Every JSON says once, as machine_info, on which machine, with which versions and from which commit it is."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from avppc.ops import _library
from avppc.processes import count_cores
from avppc.train.hardware import cpu_model, package_versions


def machine_facts() -> dict[str, Any]:
    """What a figure needs beside it; None where this machine does not tell."""
    return {
        "cpu": cpu_model(),
        "cores": count_cores(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "build": _library.build_info(),
        "versions": {
            "python": platform.python_version(),
            **package_versions(("torch", "numpy", "avppc")),
        },
        "commit": _git("rev-parse", "HEAD") or os.environ.get("AVPPC_COMMIT"),  # for a copy without .git
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Replaces the plugin's facts, the host's name among them."""
    machine_info.clear()
    machine_info.update(machine_facts())


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Leaves out what the facts say already and the single rounds."""
    del output_json["commit_info"]
    for result in output_json["benchmarks"]:
        del result["options"]
        result["stats"] = {name: result["stats"][name] for name in ("min", "median", "iqr", "rounds")}
