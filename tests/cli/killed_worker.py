"""``modelopt`` as torchrun starts it, but with processes that kill themselves with SIGKILL on the way.

    killed_worker.py DEATHS ARGUMENT ...

DEATHS is a JSON list. The n-th time that torchrun starts the processes, the one of ``rank`` dies before step
``step``; where ``saving`` is true, later: when the first state from that step on is written, and not yet in
its place. Every process adds a line to the file ``begun``: the time, its rank, the step it began with.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from modelopt_cli.artifact import writer
from modelopt_cli.cli.main import run
from modelopt_cli.training.learner import Learner
from modelopt_cli.training.loader import Batch

TIME, RANK = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])


class Dying:
    """Stands in for what it wraps."""

    def __init__(self, step: float, saving: bool) -> None:
        self.at, self.saving = step, saving
        self.learn, self.publish = Learner.step, writer._publish
        self.begun = self.reached = False

    def step(self, learner: Learner, batch: Batch, number: int, rate: float) -> None:
        if not self.begun:
            self.begun = True
            with Path("begun").open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps([TIME, RANK, number])}\n")
        self.reached = number >= self.at
        self.die(saving=False)
        self.learn(learner, batch, number, rate)

    def published(self, *args: Any) -> None:
        self.die(saving=True)
        self.publish(*args)

    def die(self, *, saving: bool) -> None:
        if self.reached and self.saving == saving:
            os.kill(os.getpid(), signal.SIGKILL)


def main(deaths: list[dict[str, Any]]) -> None:
    if TIME > 0 and RANK > 0:
        time.sleep(1)  # the main process must not take what is left of a dead one for this one
    death = deaths[TIME] if len(deaths) > TIME else {"rank": None}
    at = death["step"] if death["rank"] == RANK else float("inf")
    dying = Dying(at, death.get("saving", False))
    Learner.step = lambda *args: dying.step(*args)  # type: ignore[method-assign]
    writer._publish = dying.published
    run()


if __name__ == "__main__":
    main(json.loads(sys.argv.pop(1)))
