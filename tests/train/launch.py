"""Runs in several processes, as torchrun starts them: for the tests of pretraining at scale."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.multiprocessing
from gloo_threads import check_gloo_has_ended

from avppc.config import PretrainConfig
from avppc.processes import Stopped
from avppc.train import loop


def pretrain_in_processes(configs: Sequence[PretrainConfig], processes: int, stop_at: int | None = None) -> None:
    """Each of the runs by so many processes; with stop_at the last process gets SIGTERM in that step."""
    ports = [free_port() for _ in configs]  # a store of its own for each: processes do not leave one at the same time
    torch.multiprocessing.spawn(_work, (processes, ports, list(configs), stop_at), processes)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _work(rank: int, processes: int, ports: list[int], configs: list[PretrainConfig], stop_at: int | None) -> None:
    _enter(rank, processes)
    for config, port in zip(configs, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        if stop_at is None:
            loop.pretrain(config)
        else:
            pretrain_until(config, stop_at if rank == processes - 1 else None)
        check_gloo_has_ended()


def _enter(rank: int, processes: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
    }


def refusals(runs: Sequence[Sequence[PretrainConfig]], folder: Path) -> list[list[str]]:
    """What each process says whose settings are not those of the others; a run has one configuration a process."""
    ports = [free_port() for _ in runs]
    torch.multiprocessing.spawn(_refuse, (ports, list(runs), folder), len(runs[0]))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(len(runs[0]))]


def _refuse(rank: int, ports: list[int], runs: list[Sequence[PretrainConfig]], folder: Path) -> None:
    _enter(rank, len(runs[0]))
    said = []
    for configs, port in zip(runs, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        try:
            loop.pretrain(configs[rank])
        except ValueError as error:
            said.append(str(error))
    (folder / f"{rank}.json").write_text(json.dumps(said))


def pretrain_until(config: PretrainConfig, step: int | None) -> None:
    """A run that SIGTERM ends; sent by itself in that step, or by another process."""
    calls = 0
    clip = torch.nn.utils.clip_grad_norm_

    def clip_and_signal(*args: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return clip(*args)

    torch.nn.utils.clip_grad_norm_ = clip_and_signal
    try:
        loop.pretrain(config)
    except Stopped:
        return
    finally:
        torch.nn.utils.clip_grad_norm_ = clip
    raise AssertionError("the run was not stopped")
