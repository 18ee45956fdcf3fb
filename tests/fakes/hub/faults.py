"""Faults injected by tests, and the request log."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from fnmatch import fnmatchcase


@dataclass
class Request:
    """One request; logged on arrival, its numbers grow while it is served."""

    method: str
    path: str  # decoded, without the query
    query: str
    host: str
    authorized: bool  # whether it had an Authorization header
    headers: dict[str, str]  # names in lower case, without the Authorization header
    status: int | None = None  # None until answered, for ever if never
    sent: int = 0  # bytes of the response body
    received: int = 0  # bytes of the request body

    def matches(self, method: str, glob: str) -> bool:
        return method in ("*", self.method) and fnmatchcase(self.path, glob)


@dataclass
class Rule:
    """One fault: its action, its requests, its number of times."""

    action: str  # "fail", "cut", "drop" or "delay"
    method: str
    glob: str
    times: int | None  # None for always
    skip: int = 0  # matching requests that pass first
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "The kitchen is closed."
    after_bytes: int = 0
    seconds: float = 0.0
    hits: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def ready(self, request: Request) -> bool:
        """Return whether the rule applies to this request; count a skipped one."""
        if not request.matches(self.method, self.glob):
            return False
        with self.lock:
            if self.skip > 0:
                self.skip -= 1
                return False
            return self.times is None or self.hits < self.times

    def spend(self) -> bool:
        """Use the rule once, unless other requests have used it up meanwhile."""
        with self.lock:
            if self.times is not None and self.hits >= self.times:
                return False
            self.hits += 1
            return True


class Faults:
    """The rules, in the order given."""

    def __init__(self) -> None:
        self._rules: list[Rule] = []
        self._lock = threading.Lock()

    def add(self, rule: Rule) -> Rule:
        with self._lock:
            self._rules.append(rule)
        return rule

    def clear(self) -> None:
        with self._lock:
            self._rules.clear()

    def find(self, action: str, request: Request) -> Rule | None:
        """Return the first rule for this request without using it up."""
        with self._lock:
            rules = [rule for rule in self._rules if rule.action == action]
        return next((rule for rule in rules if rule.ready(request)), None)

    def take(self, action: str, request: Request) -> Rule | None:
        rule = self.find(action, request)
        return rule if rule is not None and rule.spend() else None
