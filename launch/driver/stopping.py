"""What ends a command before its work is done: signals, and work that is lost to another run.

The first signal ends it at once; or, where steps can be kept, asks for them to be kept and waits for
that, no longer than the grace. The second one ends it at once. This file is imported first: so nothing
heavy is.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

# SIGUSR1 is what many a scheduler is told to send ahead of a time limit.
NAMES: Mapping[int, str] = {
    signal.SIGINT: "Ctrl-C (SIGINT)",
    signal.SIGTERM: "SIGTERM",
    signal.SIGUSR1: "SIGUSR1",
}
# From the decision to end until the process is gone, whatever hangs: a cluster that does not answer.
_WAY_OUT_SECONDS = 8.0
_LOOK_SECONDS = 0.1


class Interrupted(KeyboardInterrupt):
    """A signal came, and the command ends.

    Attributes:
        number: of the first signal.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(number)


class AtOnce:
    """A handler of signals that ends the process, of a command that has not begun to work.

    Args:
        tell: called with the signal's number; returns the exit code.
    """

    def __init__(self, tell: Callable[[int], int]) -> None:
        self._tell = tell

    def __call__(self, number: int, _: FrameType | None) -> NoReturn:
        """Tell the end, and leave."""
        os._exit(self._tell(number))


class StopSignals:
    """The signals that a command got while it runs.

    Attributes:
        number: of the first one; None where there was none.
        over_grace: whether what was waited for did not end in time.
        overdue: called by another thread where the way out takes too long; must not return.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.over_grace = False
        self.overdue: Callable[[], Any] = lambda: None
        self._is_patient = False
        self._is_lost = False
        self._is_over = False
        self._ignored: set[int] = set()
        self._leaving: threading.Timer | None = None

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle the signals while the block runs; elsewhere than on the main thread, none come."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._handle) for number in NAMES}
        self._ignored = {number for number, handler in before.items() if handler is signal.SIG_IGN}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if isinstance(handler, AtOnce) else handler)
            if self._leaving is not None:
                self._leaving.cancel()

    def close(self) -> None:
        """Let no signal interrupt the end that is being reported."""
        self._is_over = True

    @contextmanager
    def patient(
        self, ask: Callable[[], bool], grace: float, tell: Callable[[str], None]
    ) -> Iterator[None]:
        """Let the block end by itself after the first signal, where it has something to keep.

        Args:
            ask: asks for work under way to be kept and to end; returns whether there is any.
            grace: seconds to wait for that.
            tell: called with a line that says what is waited for.

        Raises:
            Interrupted: after the block, if a signal came meanwhile.
        """
        ended = threading.Event()
        watch = threading.Thread(target=self._watch, args=(ended, ask, grace, tell), daemon=True)
        self._is_patient = True
        watch.start()
        try:
            yield
        finally:
            ended.set()
            self._is_patient = False
        if self.number is not None:
            self._leave()
            raise Interrupted(self.number)

    def give_up(self) -> None:
        """End the command now, from any thread: what it works on is another run's by now."""
        self._is_lost = True
        self._end()

    def _watch(
        self,
        ended: threading.Event,
        ask: Callable[[], bool],
        grace: float,
        tell: Callable[[str], None],
    ) -> None:
        while self.number is None:
            if ended.wait(_LOOK_SECONDS):
                return
        if grace > 0 and _answer(ask):
            tell(
                f"{NAMES[self.number]}: the step under way is finished and saved, for which there are "
                f"{grace:g} s (cluster.stop_grace_s); a second signal ends at once"
            )
            if ended.wait(grace):
                return
            self.over_grace = True
        if not ended.is_set():
            self._is_patient = False
            self._end()

    def _end(self) -> None:
        """Have the main thread raise, also out of a call that waits."""
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, self.number or signal.SIGINT)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._leaving is not None or self._is_over:
            return  # the way out is short, and must not be broken off
        if number in self._ignored and not self._is_lost:
            return  # as who started the command wants it: a shell does, of what it starts by `&`
        is_first = self.number is None
        if is_first and not self._is_lost:
            self.number = number
            if self._is_patient:
                return
        self._leave()
        raise Interrupted(self.number or number)

    def _leave(self) -> None:
        if self._leaving is None:
            self._leaving = threading.Timer(_WAY_OUT_SECONDS, self.overdue)
            self._leaving.daemon = True
            self._leaving.start()


def _answer(ask: Callable[[], bool]) -> bool:
    try:
        return ask()
    except Exception:  # noqa: BLE001  # who was asked may be gone
        return False
