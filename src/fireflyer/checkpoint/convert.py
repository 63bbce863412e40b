"""A checkpoint in another precision: streamed file to file, stopped at any moment, gone on with.

In: a CHECKPOINT (fp32, bf16, fp16, block FP8, GGUF) and a precision. Out: a folder in the published format, or packed
for int8 and int4, with config, tokenizer and MTP layers. Memory is bounded by a few chunks of rows, whatever the model
weighs; packing takes a whole matrix at a time. A file bears its name once it is whole and on disk; before that it is
NAME.part, and `conversion.json` says how much of it holds.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from fireflyer.checkpoint.conversion_plan import ConversionPlan, Piece, PlannedFile, Precision, plan_conversion
from fireflyer.checkpoint.conversion_record import Record, find_record, fingerprint, is_whole, locked, part_name
from fireflyer.checkpoint.gguf import is_gguf
from fireflyer.checkpoint.hf import MAX_SHARD_BYTES, TOKENIZER_FILES, copy_tokenizer
from fireflyer.checkpoint.published import CONFIG, INDEX, BlockFP8Tensor, Checkpoint, open_checkpoint
from fireflyer.checkpoint.run import sync, write_text
from fireflyer.checkpoint.safetensors_file import as_bytes
from fireflyer.config.files import read_json
from fireflyer.errors import Stopped, UserError

SAVE_EVERY_S = 2.0
"""So often the disk is made to take what was written, and the record then says so, while the conversion goes on."""

_BESIDE = (*TOKENIZER_FILES, "*.py", "LICENSE*")
_MAX_WORKERS = 8
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Chunks = list[tuple[int, memoryview]]
"""(file position, bytes) of what a step made."""


@dataclass(frozen=True)
class Progress:
    """How far a conversion is; `tensor` was last written to."""

    done_bytes: int
    total_bytes: int
    file: int
    num_files: int
    tensor: str


@dataclass(frozen=True)
class Converted:
    """What a finished conversion left; `already`: there was nothing to do."""

    folder: Path
    num_tensors: int
    num_bytes: int
    num_files: int
    already: bool


@dataclass(frozen=True)
class Conversion:
    """Everything checked, and nothing written yet. `present_bytes` of the plan are there from an earlier start."""

    checkpoint: Checkpoint
    folder: Path
    plan: ConversionPlan
    record: Record
    present_bytes: int

    @property
    def is_done(self) -> bool:
        return self.record.finished and self.present_bytes == self.plan.num_bytes


def convert(
    path: str | Path,
    folder: str | Path,
    to: Precision,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Converted:
    """Convert a CHECKPOINT into a folder: a new one, an empty one, or one where the same conversion was begun.

    should_stop: asked after each step; True saves what is done and raises Stopped.

    Raises UserError, naming file and tensor, before anything is written where that can be; a full disk keeps what was
    done, and the same call goes on.
    """
    conversion = prepare(path, folder, to, max_shard_bytes=max_shard_bytes)
    return run(conversion, on_progress, should_stop)


def prepare(
    path: str | Path, folder: str | Path, to: Precision, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> Conversion:
    """Open the source, plan, look at the destination; writes nothing. Raises UserError."""
    checkpoint, folder = open_checkpoint(path), Path(folder)
    source = checkpoint.folder
    published = checkpoint.config.to_dict() if is_gguf(source) else read_json(source / CONFIG)
    plan = plan_conversion(checkpoint.config, checkpoint.tensors, to, published, max_shard_bytes=max_shard_bytes)
    record = find_record(folder, source, Record(to, max_shard_bytes, fingerprint(_files(checkpoint))))
    return Conversion(checkpoint, folder, plan, record, _present_bytes(folder, plan, record))


def run(
    conversion: Conversion,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Converted:
    """Do what is prepared. Raises Stopped and UserError as `convert` does."""
    folder, plan = conversion.folder, conversion.plan
    if not conversion.is_done:
        _check_space(folder, plan.num_bytes - conversion.present_bytes)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with locked(folder):
                conversion.record.finished = False
                conversion.record.write(folder)
                with _one_thread_each():
                    _Writer(conversion, on_progress, should_stop).write_all()
                _finish(conversion)
        except OSError as error:
            raise UserError(_refused(folder, error)) from error
    return Converted(folder, len(plan.outputs), plan.num_bytes, len(plan.files), conversion.is_done)


class _Writer:
    """Writes the planned files, one after the other, each in the order of its steps."""

    def __init__(
        self, conversion: Conversion, on_progress: Callable[[Progress], None], should_stop: Callable[[], bool]
    ) -> None:
        self._folder = conversion.folder
        self._files = conversion.plan.files
        self._record = conversion.record
        self._on_progress = on_progress
        self._should_stop = should_stop
        self._total = conversion.plan.num_bytes
        self._done = 0
        self._saving: Future[None] | None = None
        self._saved_at = time.monotonic()

    def write_all(self) -> None:
        """Write what isn't there yet."""
        with ThreadPoolExecutor(_num_workers()) as pool, ThreadPoolExecutor(1) as saver:
            for number, file in enumerate(self._files, start=1):
                if is_whole(self._folder, file):
                    self._done += file.num_bytes
                    continue
                part = self._folder / part_name(file)
                goes_on = self._record.can_go_on(self._folder, file)
                with open(part, "r+b" if goes_on else "wb", buffering=0) as out:
                    if not goes_on:
                        self._begin(out, file)
                    self._done += self._record.bytes
                    try:
                        self._take_steps(pool, saver, out, number, file)
                    except (OSError, UserError, Stopped):
                        with suppress(OSError):
                            self._wait()
                            self._save(out, self._record)
                        raise
                    self._wait()
                    os.fsync(out.fileno())
                part.replace(self._folder / file.name)
                sync(self._folder)

    def _begin(self, out: FileIO, file: PlannedFile) -> None:
        out.truncate(file.num_bytes)
        _write_at(out, 0, memoryview(file.header))
        record = self._record
        record.file, record.num_steps, record.steps, record.bytes = file.name, len(file.steps), 0, len(file.header)

    def _take_steps(
        self, pool: ThreadPoolExecutor, saver: ThreadPoolExecutor, out: FileIO, number: int, file: PlannedFile
    ) -> None:
        record, steps = self._record, file.steps[self._record.steps :]
        tasks = (partial(_make, file, piece, step) for piece, step in steps)
        with closing(_in_order(pool, tasks)) as made:
            for (piece, _), chunks in zip(steps, made, strict=True):
                tensor = next(iter(piece.outputs))
                try:
                    written = sum(_write_at(out, position, data) for position, data in chunks)
                except OSError as error:
                    raise UserError(_refused(self._folder / file.name, error, tensor)) from error
                record.steps += 1
                record.bytes += written
                self._done += written
                self._on_progress(Progress(self._done, self._total, number, len(self._files), tensor))
                if self._should_stop():
                    raise Stopped(f"{self._folder}: stopped and saved; the same command goes on from there")
                if time.monotonic() - self._saved_at >= SAVE_EVERY_S and (self._saving is None or self._saving.done()):
                    self._wait()
                    self._saving = saver.submit(self._save, out, replace(record))

    def _save(self, out: FileIO, record: Record) -> None:
        """Have the disk take all steps so far, then say so."""
        os.fsync(out.fileno())
        record.write(self._folder)
        self._saved_at = time.monotonic()

    def _wait(self) -> None:
        """Wait for the save in flight; raises its error."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()


def _make(file: PlannedFile, piece: Piece, step: int) -> Chunks:
    chunks = []
    for name, first_row, rows in piece.make(step):
        data = as_bytes(rows, piece.outputs[name][0])
        chunks.append((file.offsets[name] + first_row * (len(data) // len(rows)), data))
    return chunks


def _in_order(pool: ThreadPoolExecutor, tasks: Iterable[Callable[[], Chunks]]) -> Generator[Chunks, None, None]:
    """The tasks' results in their order, a few made ahead of the one that is asked for."""
    waiting: deque[Future[Chunks]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(task))
            if len(waiting) > _num_workers() + 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _write_at(out: FileIO, position: int, data: memoryview) -> int:
    out.seek(position)
    left = data
    while left:
        left = left[out.write(left) :]
    return len(data)


def _finish(conversion: Conversion) -> None:
    """All that isn't weights. The record comes last, and says nothing of the way."""
    folder, plan, record = conversion.folder, conversion.plan, conversion.record
    source = conversion.checkpoint.folder
    if is_gguf(source):
        copy_tokenizer(source, folder)
    else:
        for path in _beside(source):
            shutil.copyfile(path, folder / path.name)
    if plan.index is not None:
        _write_json(folder / INDEX, plan.index)
    _write_json(folder / CONFIG, plan.config)
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            sync(path)
    finished = Record(record.to, record.max_shard_bytes, record.source, finished=True)
    finished.write(folder)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def _beside(source: Path) -> list[Path]:
    """The files that come along as they are."""
    return sorted({path for pattern in _BESIDE for path in source.glob(pattern) if path.is_file()})


def _files(checkpoint: Checkpoint) -> list[Path]:
    """All that a conversion reads."""
    files = {tensor.path for tensor in checkpoint.tensors.values()}
    files |= {tensor.scale_inv.path for tensor in checkpoint.tensors.values() if isinstance(tensor, BlockFP8Tensor)}
    if not is_gguf(checkpoint.folder):
        files |= {checkpoint.folder / CONFIG, *_beside(checkpoint.folder)}
    return sorted(files)


def _present_bytes(folder: Path, plan: ConversionPlan, record: Record) -> int:
    present = 0
    for file in plan.files:
        if is_whole(folder, file):
            present += file.num_bytes
        elif record.can_go_on(folder, file):
            present += record.bytes
    return present


def _check_space(folder: Path, needed: int) -> None:
    """A disk that can't hold the rest is told before a day is spent on filling it."""
    place = folder.absolute()
    while not place.is_dir():
        place = place.parent
    try:
        free = shutil.disk_usage(place).free
    except OSError as error:
        raise UserError(_refused(folder, error)) from None
    if needed > free:
        raise UserError(
            f"{folder}: the conversion writes {needed:,} bytes more, and {free:,} are free there; free the difference,"
            " or give a folder on another disk"
        )


def _refused(path: Path, error: OSError, tensor: str = "") -> str:
    mend = "free some space" if error.errno in _FULL else "see to the disk, or give another folder"
    what = f"{path}: {tensor} can't be written" if tensor else f"{path}: can't be written"
    return f"{what} ({error.strerror}); {mend}, and the same command goes on with what is done"


def _num_workers() -> int:
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return min(cores, _MAX_WORKERS)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Rows are shared out among our own threads; torch's within each would only get in their way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
