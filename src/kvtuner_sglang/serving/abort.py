"""One way to end everything that waits on a cluster once the cluster is known to be dead."""

import threading


class Abort:
    """Set once, with the reason, by whoever finds the fault first; later reasons are ignored."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._reason: str | None = None

    def set(self, reason: str) -> None:
        with self._lock:
            if self._reason is None:
                self._reason = reason
                self._event.set()

    @property
    def reason(self) -> str | None:
        """One sentence without its full stop, or None while all is well."""
        return self._reason

    def is_set(self) -> bool:
        return self._event.is_set()

    def wait(self, timeout_s: float) -> bool:
        """True as soon as it is set, False after `timeout_s` seconds."""
        return self._event.wait(timeout_s)
