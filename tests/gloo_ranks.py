"""Functions run on gloo ranks: several processes of this machine, started once for all the checks of a file."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing


class Ranks:
    """`size` processes; `run(function, *args)` calls it on each of them, and gives what each returned, by rank."""

    def __init__(self, size: int) -> None:
        context = torch.multiprocessing.get_context("spawn")
        self._folder = TemporaryDirectory(prefix="fireflyer-ranks-")
        store = str(Path(self._folder.name) / "store")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, store, there), daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function`: of a module's top level, so that the processes find it."""
        for pipe in self._pipes:
            pipe.send((function, args))
        answers = [pipe.recv() if pipe.poll(60) else (None, "no answer in 60 s") for pipe in self._pipes]
        wrong = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(answers) if error]
        assert not wrong, "\n".join(wrong)
        return [answer for answer, _ in answers]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
        self._folder.cleanup()


def _serve(rank: int, size: int, store: str, pipe: Connection) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, size), rank=rank, world_size=size, timeout=timedelta(seconds=20)
    )
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            break
        try:
            pipe.send((function(*args), None))
        except Exception:
            pipe.send((None, traceback.format_exc()))
    os._exit(0)  # the others may have gone already: no parting words
