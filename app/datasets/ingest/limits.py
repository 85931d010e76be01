"""What an upload may cost, and refusals with their problems. Bytes are counted: what a file declares is not trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MIB = 1 << 20
MOST_LISTED_PROBLEMS = 100


@dataclass(frozen=True)
class UploadLimits:
    """The most that checking and packing one upload may take."""

    unpacked_bytes: int = 20 * 1024 * MIB  # sum of the members, and again of the decoded pictures
    entries: int = 1_000_000
    picture_bytes: int = 64 * MIB  # one picture file
    picture_pixels: int = 16_000_000  # by its header, before anything is decoded
    example_bytes: int = 256 * MIB  # one example is in memory while it is checked
    classes: int = 100_000
    labels: int = 64 * MIB  # labels are in memory while they are checked: 8 bytes each
    ratio: int = 200  # zeros deflate 1029 : 1
    ratio_from_bytes: int = 64 * MIB  # below it no bomb: sorted labels of a small data set deflate better than pictures
    memory_bytes: int = 4096 * MIB  # address space of the checking process, most of it libraries
    cpu_s: int = 4 * 3600
    corrupt_share: float = 0.01  # pictures that cannot be decoded are skipped below this share of all


@dataclass(frozen=True)
class UploadProblem:
    """One thing that is wrong with an upload: the file or array it is about, and a sentence."""

    file: str
    message: str

    def document(self) -> dict[str, str]:
        """The problem as the API shows it."""
        return {"file": self.file, "message": self.message}


class Rejected(Exception):
    """The upload cannot become a data set."""

    def __init__(self, *problems: UploadProblem) -> None:
        self.problems = problems
        super().__init__("; ".join(f"{problem.file}: {problem.message}" for problem in problems[:3]))


def rejection(file: str, message: str) -> Rejected:
    """A refusal with one problem, to be raised."""
    return Rejected(UploadProblem(file, message))


def shorten_problems(problems: Sequence[UploadProblem]) -> tuple[UploadProblem, ...]:
    """At most 100 problems; what was left out is counted in a last one."""
    if len(problems) <= MOST_LISTED_PROBLEMS:
        return tuple(problems)
    left_out = len(problems) - MOST_LISTED_PROBLEMS
    return (*problems[:MOST_LISTED_PROBLEMS], UploadProblem("", f"and {left_out} more files with problems"))
