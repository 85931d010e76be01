"""A worker process of the contract suite: claims until nothing waits, and prints what it got.

python -m tests.support.services.claimer DATABASE_URL THREADS
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

from app.database.engine import Database
from app.jobs import attempts
from app.jobs.events import NewEvent


def main(url: str, threads: int) -> None:
    """Claim with several threads; each claimed job says two events and is released or finished for good."""
    db = Database(url)

    def work(number: int) -> list[str]:
        got = []
        while (claim := attempts.claim(db, worker_id=f"w{number}")) is not None:
            got.append(f"{claim.job_id} {claim.attempt}")
            attempts.renew(
                db, claim, worker_id=f"w{number}", events=[NewEvent("warning", "warn", str(n)) for n in (1, 2)]
            )
            attempts.finish(db, claim, summary={}, report={}, artifacts=[])
        return got

    with ThreadPoolExecutor(threads) as pool:
        for got in pool.map(work, range(threads)):
            print("\n".join(got))
    db.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
