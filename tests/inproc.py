"""Run the command in this process, through its own entry point, with streams captured and global state restored.

Nothing is loaded again, so a command takes only as long as its job. Processes remain where they matter: kills, signals,
locks, restarts, the environment of libraries, and memory.
"""

from __future__ import annotations

import faulthandler
import gc
import io
import logging
import os
import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NoReturn

import numpy
import optuna
import torch
from huggingface_hub import constants
from transformers.utils import logging as transformers_logging

from job.cli.main import main
from tests.warm import forget_cached

# Longer than any command; it replaces pytest's own alarm meanwhile.
_LONGEST_SECONDS = 800
# torch's state in a new process.
_SEED_OF_TORCH = 67280421310721

# The libraries stay: collections after commands look only at newer objects.
gc.collect()
gc.freeze()


def can_run_here() -> bool:
    """Return whether a command can run in this thread: only the main one handles signals."""
    return sys.platform == "linux" and threading.current_thread() is threading.main_thread()


def run_here(arguments: Sequence[str], environment: Mapping[str, str], folder: Path | None) -> tuple[int, str, str]:
    """Return the exit code, the output and the errors of a command."""
    out, err, modules = io.StringIO(), io.StringIO(), len(sys.modules)
    with ExitStack() as stack:
        for kept in (_signals(), _environment(environment), _libraries(), _modules(), _threads()):
            stack.enter_context(kept)
        stack.enter_context(redirect_stdout(out))
        stack.enter_context(redirect_stderr(err))
        stack.enter_context(_folder(folder))
        stack.enter_context(_arguments(arguments))
        stack.enter_context(_warnings())
        code = _code_of_main()
        _collect(modules)
    return code, out.getvalue(), err.getvalue()


def _collect(modules: int) -> None:
    """Collect what a process frees on exit: files, sockets, a model; not imported modules."""
    gc.collect()
    if len(sys.modules) != modules:
        gc.freeze()


def _code_of_main() -> int:
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)  # a message instead of a number would fail here
    return 0


@contextmanager
def _signals() -> Iterator[None]:
    """Restore the handlers and pytest's alarm; end this process with a traceback if a command hangs."""
    former = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)}
    left, interval = signal.setitimer(signal.ITIMER_REAL, 0)
    # Under pytest the defaults of these differ from those of a command.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    faulthandler.dump_traceback_later(_LONGEST_SECONDS, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        for number, handler in former.items():
            signal.signal(number, handler)
        signal.setitimer(signal.ITIMER_REAL, left, interval)


@contextmanager
def _environment(wanted: Mapping[str, str]) -> Iterator[None]:
    """Set the command's variables, and make the Hub's client see at once that it is offline."""
    former, offline = dict(os.environ), constants.HF_HUB_OFFLINE
    _become(wanted)
    constants.HF_HUB_OFFLINE = wanted.get("HF_HUB_OFFLINE") == "1"
    forget_cached()
    try:
        yield
    finally:
        _become(former)
        forget_cached()
        constants.HF_HUB_OFFLINE = offline


def _become(wanted: Mapping[str, str]) -> None:
    for name in os.environ.keys() - wanted.keys():
        del os.environ[name]
    os.environ.update(wanted)


@contextmanager
def _libraries() -> Iterator[None]:
    """Start with the random states and verbosity of a new process, then restore them."""
    threads, gradients = torch.get_num_threads(), torch.is_grad_enabled()
    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    logger = logging.getLogger("accelerate.big_modeling")
    levels = transformers_logging.get_verbosity(), optuna.logging.get_verbosity(), logger.level
    bars = transformers_logging.is_progress_bar_enabled()
    torch.manual_seed(_SEED_OF_TORCH)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_grad_enabled(gradients)
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.set_rng_state(states[2])
        transformers_logging.set_verbosity(levels[0])
        optuna.logging.set_verbosity(levels[1])
        logger.setLevel(levels[2])
        (transformers_logging.enable_progress_bar if bars else transformers_logging.disable_progress_bar)()


@contextmanager
def _modules() -> Iterator[None]:
    """Make a restart fail: it would replace the tests by the command."""

    def restart(*_: Any) -> NoReturn:
        raise AssertionError("the command restarts itself: start it as a process of its own")

    former, os.execv = os.execv, restart
    try:
        yield
    finally:
        os.execv = former


@contextmanager
def _threads() -> Iterator[None]:
    """Wait for the command's threads except daemons, as the interpreter does at exit."""
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        if not thread.daemon:
            while thread.ident is None:  # it is being started
                time.sleep(0.001)
            thread.join(60)


@contextmanager
def _folder(folder: Path | None) -> Iterator[None]:
    former = Path.cwd()
    if folder is not None:
        os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(former)


@contextmanager
def _arguments(arguments: Sequence[str]) -> Iterator[None]:
    former, sys.argv = sys.argv, ["-c", *arguments]
    try:
        yield
    finally:
        sys.argv = former


@contextmanager
def _warnings() -> Iterator[None]:
    """Show warnings as a process does, instead of raising them."""
    with warnings.catch_warnings():
        warnings.resetwarnings()
        for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", kind)
        warnings.filterwarnings("default", category=DeprecationWarning, module="__main__")
        warnings.showwarning = _show
        yield


def _show(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: str | None = None) -> None:
    print(warnings.formatwarning(message, category, filename, lineno, line), file=file or sys.stderr, end="")
