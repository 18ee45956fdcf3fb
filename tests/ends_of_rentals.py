"""Table of all ends of rentals, made from the policy.

`python -m tests.ends_of_rentals --write docs/ends-of-rentals.md` writes it.
"""

from __future__ import annotations

import signal
from itertools import product

from job.cloud.end_policy import ACTIONS, SAFE, AskedEnds, Ended, Safety, ending
from tests.generated import write_or_print

# Every way in which a start can end.
WAYS: dict[str, Ended] = {
    "0: delivered": Ended(0),
    "0: the job was found finished": Ended(0),
    "0: only the delivery was left": Ended(0),
    "1: unexpected error": Ended(1),
    "2: bad usage or settings, unknown variable, empty checkpoint": Ended(2),
    "3: preflight: impossible job": Ended(3),
    "4: held by another process on this machine": Ended(4),
    "4: held by another machine": Ended(4, elsewhere=True),
    "5: a gate was missed": Ended(5),
    "6: a delivery failed for good": Ended(6),
    "75: stopped by a signal": Ended(75),
    "75: the watchdog ended a hung forward": Ended(75, hung=True),
    "76: preflight: not on this machine": Ended(76),
    "another exit code": Ended(120),
    "killed: out of memory, or `kill -9`": Ended(-signal.SIGKILL),
    "killed: segmentation fault": Ended(-signal.SIGSEGV),
    "killed: abort, bus error": Ended(-signal.SIGABRT),
    "killed: stop signal before it was handled": Ended(-signal.SIGTERM),
    "killed after a stop signal": Ended(-signal.SIGKILL, signalled=True),
}
# State of the machine and of the places off it.
SITUATIONS: dict[str, Safety] = {
    "delivered and mirrored": SAFE,
    "only mirrored": Safety(unsaved="an export is not delivered"),
    "nothing safe": Safety(unsaved="all is on this machine alone"),
    "another job is not delivered": Safety(others="another job is not delivered"),
    "lease held by another runner": Safety(held="another runner holds the job"),
}
_SHORT = {"nothing": "–", "stop": "stop", "destroy": "**destroy**"}
_INTRODUCTION = """# Ends of rentals

Three things decide whether the rented machine is left running, stopped or destroyed:

- how the command has ended,
- the value of `--when-done` or `--when-failed`,
- what is stored on the machine and off it at that moment.

Each cell shows two results: with `stop`, and with `destroy`. `–` means that the machine is left running. If the job
does less than the option says, it warns and gives the reason.

"Delivered and mirrored" is checked before every destroy. All objects of the checkpoint are read back and compared with
the run folder. Each target is checked for the export's manifest and all its files. A job without an export needs no
delivery.

A place on this machine does not count. Among mounted file systems only these do: {kinds}.
MooseFS, mountpoint-s3, gcsfuse and s3fs also count where the mount's source names them. A server on a loopback address
does not. `--allow rental.survival` vouches for any other place; its contents are still checked.

Written by `python -m tests.ends_of_rentals --write docs/ends-of-rentals.md`.

"""


def asked_for(action: str) -> AskedEnds:
    return next(AskedEnds(one, one) for one in ACTIONS if one == action)


def decides(outcome: Ended) -> str:
    """Return the option that decides after such an end."""
    done = ending(outcome, AskedEnds(when_done="destroy"), SAFE).action != "nothing"
    failed = ending(outcome, AskedEnds(when_failed="destroy"), SAFE).action != "nothing"
    return "`--when-done`" if done else "`--when-failed`" if failed else "neither"


def page() -> str:
    from job.preflight.mounts import OFF_MACHINE

    kinds = ", ".join(f"`{kind}`" for kind in sorted(OFF_MACHINE))
    lines = [
        f"| Exit code and why | Decided by | {' | '.join(SITUATIONS)} |",
        "|---|---|" + "---|" * len(SITUATIONS),
    ]
    for way, outcome in WAYS.items():
        cells = [
            " / ".join(_SHORT[ending(outcome, asked_for(asked), safety).action] for asked in ("stop", "destroy"))
            for safety in SITUATIONS.values()
        ]
        lines.append(f"| {way} | {decides(outcome)} | {' | '.join(cells)} |")
    return _INTRODUCTION.format(kinds=kinds) + "\n".join(lines) + "\n"


def cases() -> list[tuple[str, str, str, str]]:
    """Return way, when_done, when_failed and situation of every case."""
    return list(product(WAYS, ACTIONS, ACTIONS, SITUATIONS))


if __name__ == "__main__":
    write_or_print(page())
