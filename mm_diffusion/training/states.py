"""Training states on disk: written, found again, thinned out. Folders may be remote.

A state is ema_RATE_NNNNNN.pt, optNNNNNN.pt, modelNNNNNN.pt, written in this order, and last its
manifest stateNNNNNN.json, with the length and SHA-256 of each. NNNNNN: optimizer steps done.
"""

from __future__ import annotations

import contextlib
import errno
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import blobfile as bf

from .. import checkpoint, logger
from ..checkpoint import MODEL_FILE, CheckpointError
from ..files import write_text

MANIFEST = re.compile(r"state(\d+)\.json")


class StateError(OSError):
    """A state that could not be written: one line, with the state that is intact."""


class State(NamedTuple):
    """A state; `files`: name -> checksum, {} without a manifest, None where that is corrupt.

    resumed_from: the path that its run resumed, if it began in another one.
    """

    folder: str
    step: int
    files: Mapping[str, Mapping[str, Any]] | None
    resumed_from: str = ""

    def path(self, kind: str) -> str:
        """The file of a kind: "model", "opt" or "ema_RATE_"."""
        return bf.join(self.folder, f"{kind}{self.step:06d}.pt")

    @property
    def manifest(self) -> str:
        """The path of the manifest."""
        return bf.join(self.folder, f"state{self.step:06d}.json")

    def is_weights_only(self) -> bool:
        """Whether it has neither averages nor an optimizer, like a checkpoint that is passed on."""
        names = set(bf.listdir(self.folder or "."))
        averages = (match for match in map(checkpoint.EMA_FILE.fullmatch, names) if match)
        has_averages = any(int(match[2]) == self.step for match in averages)
        return not self.files and not has_averages and bf.basename(self.path("opt")) not in names

    def corruption(self) -> str:
        """What is wrong with it; "" if it is intact, as far as a manifest tells."""
        if self.files is None:
            return f"{self.manifest} is corrupt"
        reasons = (checkpoint.corruption(bf.join(self.folder, n), s) for n, s in self.files.items())
        return next(filter(None, reasons), "")


def states_in(folder: str) -> list[State]:
    """All states, newest first, unverified: with a manifest, or with a model and optimizer file.

    One without a readable manifest counts as of the run of the state before it.
    """
    names = set(bf.listdir(folder)) if bf.isdir(folder) else set()
    steps = {int(match[1]) for match in map(MANIFEST.fullmatch, names) if match}
    models = [match[1] for match in map(MODEL_FILE.fullmatch, names) if match]
    steps |= {int(number) for number in models if f"opt{number}.pt" in names}
    states: list[State] = []
    resumed_from = ""
    for step in sorted(steps):
        manifest = checkpoint.read_manifest(State(folder, step, files={}).manifest)
        known: dict[str, Any] = {"files": None} if manifest is None else manifest
        resumed_from = known.get("resumed_from", resumed_from)
        states.append(State(folder, step, known.get("files", {}), resumed_from))
    return states[::-1]


def newest_intact(folder: str, warn: Callable[[str], None]) -> State | None:
    """The newest intact state of the folder, with a warning for each newer one; None if empty.

    CheckpointError where there are states and none is intact.
    """
    states = states_in(folder)
    if not states:
        return None
    for state in states:
        reason = state.corruption()
        if not reason:
            return state
        warn(f"{reason}; trying the state before step {state.step}")
    count = len(states)
    raise CheckpointError(f"{folder}: none of its {count} states is intact; choose another folder")


def write_state(
    state: State, contents: Iterable[tuple[str, Any]], record: Mapping[str, Any]
) -> None:
    """Write (kind, content) after (kind, content), and a manifest that holds `record` as well.

    StateError, without files of this state, where that fails.
    """
    start = time.monotonic()
    written: dict[str, Any] = {}
    try:
        for kind, content in contents:
            path = state.path(kind)
            written[bf.basename(path)] = checkpoint.save(path, content)
        manifest = {"step": state.step, "resumed_from": state.resumed_from, "files": written}
        write_text(state.manifest, json.dumps({**manifest, **record}, indent=1), durable=True)
    except (OSError, bf.Error) as error:
        with contextlib.suppress(OSError, bf.Error):
            _remove(state.folder, written)  # of no use without a manifest
        raise StateError(_report(state, error)) from None
    logger.log(f"saved {state.path('model')} and its state in {time.monotonic() - start:.1f} s")


def _report(state: State, error: Exception) -> str:
    full = getattr(error, "errno", 0) in (errno.ENOSPC, errno.EDQUOT)
    reason = "the disk is full" if full else " ".join(str(error).split())
    intact = next((s for s in states_in(state.folder) if not s.corruption()), None)
    kept = f"the state of step {intact.step} is intact" if intact else "no state was saved before"
    return f"{state.folder}: cannot save step {state.step}: {reason}; {kept}"


def thin_out(folder: str, newest: int, keep_last: int, keep_every: int) -> None:
    """Remove states up to step `newest`, but the last `keep_last` and multiples of `keep_every`.

    keep_last 0 keeps all, keep_every 0 no multiples. States without a manifest stay.
    """
    if not keep_last:
        return
    complete = [state for state in states_in(folder) if state.files and state.step <= newest]
    try:
        for state in complete[keep_last:]:
            if not keep_every or state.step % keep_every:
                files = sorted(state.files or (), reverse=True)
                _remove(folder, [bf.basename(state.manifest), *files])
    except (OSError, bf.Error) as error:
        logger.warn(f"{folder}: cannot remove old states ({' '.join(str(error).split())})")


def _remove(folder: str, names: Iterable[str]) -> None:
    for name in names:
        if bf.exists(path := bf.join(folder, name)):
            bf.remove(path)
