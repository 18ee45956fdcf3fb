"""A table of cards to plan for, and `--on 4xRTX4090`."""

from __future__ import annotations

import difflib
import re

from job.errors import UsageError
from job.preflight.checks import GIB
from job.preflight.readings import GpuReading, MachineReading
from job.records import Record
from job.text.names import letters_and_digits

MOST_CARDS = 16
# Lowest CUDA version that a host's driver has to know: that of the wheels in constraints.txt.
MIN_CUDA = "13.0"


class Card(Record):
    """A kind of GPU.

    Memory is usable (cuDeviceTotalMem); rates are from data sheets, dense; prices are rough ranges on rental markets in
    2026.

    Attributes:
        tflops: bfloat16 matrix products, 10¹² operations per second.
        bandwidth: Memory bandwidth, GB/s.
    """

    name: str
    gib: float
    tflops: float
    bandwidth: float
    compute_capability: tuple[int, int]
    dollars: tuple[float, float]
    offer: str

    @property
    def total_bytes(self) -> int:
        """Usable memory in bytes."""
        return int(self.gib * GIB)

    @property
    def price(self) -> float:
        """Middle of the price range, dollars per hour."""
        return sum(self.dollars) / 2


_ROWS: tuple[tuple[str, float, float, float, tuple[int, int], tuple[float, float], str], ...] = (
    ("RTX3090", 23.6, 71, 936, (8, 6), (0.15, 0.35), "RTX_3090"),
    ("RTX4090", 23.5, 165, 1008, (8, 9), (0.30, 0.70), "RTX_4090"),
    ("RTX5090", 31.3, 210, 1792, (12, 0), (0.40, 0.90), "RTX_5090"),
    ("A6000", 47.4, 155, 768, (8, 6), (0.40, 0.80), "RTX_A6000"),
    ("L40S", 44.4, 362, 864, (8, 9), (0.60, 1.10), "L40S"),
    ("A100-40", 39.4, 312, 1555, (8, 0), (0.60, 1.20), "A100_SXM4"),
    ("A100-80", 79.1, 312, 2039, (8, 0), (0.80, 1.90), "A100_SXM4"),
    ("H100-80", 79.1, 989, 3350, (9, 0), (1.70, 3.20), "H100_SXM"),
    ("H200", 139.8, 989, 4800, (9, 0), (2.20, 4.00), "H200"),
    ("B200", 178.3, 2250, 8000, (10, 0), (3.50, 6.00), "B200"),
)


def cards() -> tuple[Card, ...]:
    """Return all cards of the table."""
    keys = ("name", "gib", "tflops", "bandwidth", "compute_capability", "dollars", "offer")
    return tuple(Card(**dict(zip(keys, row, strict=True))) for row in _ROWS)


def find_card(name: str) -> Card:
    """Return a card by name, ignoring blanks, dashes and case. Raises UsageError for unknown ones."""
    known = {letters_and_digits(card.name): card for card in cards()}
    wanted = letters_and_digits(name)
    if wanted in known:
        return known[wanted]
    close = difflib.get_close_matches(wanted, known, n=1, cutoff=0.4)
    names = ", ".join(card.name for card in known.values())
    raise UsageError(
        f"unknown GPU {name!r}",
        remedy=f"did you mean {known[close[0]].name}?" if close else f"choose one of {names}, or give a file",
    )


def card_of(gpu: GpuReading) -> Card | None:
    """Return the card with a GPU's product name and memory, None if it is not in the table."""
    plain = letters_and_digits(gpu.name)
    fitting = [
        card
        for card in cards()
        if letters_and_digits(card.name.split("-")[0]) in plain
        and abs(card.total_bytes - gpu.total_bytes) < card.total_bytes / 8
    ]
    # "RTX A6000" and "A6000" are one, and of two that fit the longer name says more.
    return max(fitting, key=lambda card: len(card.name), default=None)


def parse_on(text: str) -> MachineReading:
    """Return an idle machine with cards such as "4xRTX4090" or "H200". Raises UsageError for unknown ones."""
    match = re.fullmatch(r"(?:(\d+)\s*[x×*]\s*)?(\S.*)", text.strip(), flags=re.IGNORECASE)
    if match is None:
        raise UsageError(f"--on {text!r}: not of the form NxCARD", remedy="write --on 4xRTX4090")
    count = int(match[1] or 1)
    card = find_card(match[2])
    if not 1 <= count <= MOST_CARDS:
        raise UsageError(f"--on {text}: a machine has 1 to {MOST_CARDS} GPUs", remedy="correct the number")
    gpus = tuple(
        GpuReading(
            index=index,
            name=card.name,
            total_bytes=card.total_bytes,
            free_bytes=card.total_bytes,
            compute_capability=card.compute_capability,
        )
        for index in range(count)
    )
    return MachineReading(source="table", gpus=gpus)


def offers_query(card: Card, count: int, disk_bytes: int) -> str:
    """Return the command that lists Vast.ai's offers of a set of cards, cheapest first."""
    # Vast.ai counts in 10⁹ bytes; the name alone does not tell the two sizes of some cards apart.
    memory = int(card.gib * 0.95)
    disk = -(-disk_bytes // 10**9)
    return (
        f"vastai search offers 'gpu_name={card.offer} num_gpus={count} gpu_ram>={memory} disk_space>={disk} "
        f"cuda_max_good>={MIN_CUDA}' --order dph_total"
    )
