"""How much work waits, and whether one more process pays."""

from __future__ import annotations

from dataclasses import dataclass

from medray.execution.actor_pool import Pool

# Regions that show how fast they go, after as many that waited for the model, too.
_MEASURED = 16


@dataclass
class Backlog:
    """How much work waits, and how fast it goes, as far as it is known.

    Attributes:
        slides: Slides that are not planned yet.
        planned: Slides that are.
        found: Regions that those have.
        done: Regions that came back from processes.
        first: The same, and the seconds that processes had been there, when the model
            was loaded everywhere.
    """

    slides: int
    planned: int = 0
    found: int = 0
    done: int = 0
    first: tuple[int, float] | None = None

    def waiting(self, regions: int) -> float:
        """Estimate the regions that wait: these, and those of slides to be planned."""
        return regions + self.slides * self.found / max(1, self.planned)

    def asks_for_more(self, regions: int, region_workers: Pool) -> bool:
        """Return whether one more process pays.

        Args:
            regions: Regions that are planned and not assigned. None: the processes that
                are there wait for plans themselves.
            region_workers: The processes.
        """
        if self.first is None and self.done >= _MEASURED:
            self.first = self.done, region_workers.there_s
        if self.first is None or not regions:
            return False
        done, there_s = (
            self.done - self.first[0],
            region_workers.there_s - self.first[1],
        )
        waiting = self.waiting(regions)
        return is_worth_another(
            waiting, done, there_s, region_workers.size, region_workers.start_s
        )


def is_worth_another(
    waiting: float, done: int, there_s: float, processes: int, start_s: float
) -> bool:
    """Return whether one more process pays.

    It does if what waits takes those that are there, or are coming, longer than the
    slowest of them took to come: a machine that is bought for less finds nothing to do.

    Args:
        waiting: Regions that wait.
        done: Regions that were done since the model was loaded.
        there_s: Seconds that processes have been there since, all together.
        processes: How many there are, those that are coming included.
        start_s: Seconds that the slowest took to come; 0: none has come yet.
    """
    if done < _MEASURED or not start_s:
        return False
    return waiting * there_s / done / processes > start_s
