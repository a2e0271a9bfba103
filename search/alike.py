"""When trials fail alike, so that what would be begun next would fail like them."""

from search.records import Row
from trainer.data import ON_NODE

IN_A_ROW = 3


class FailingAlike:
    """Failures in a row, none coming to a rung meanwhile; `said` is why the search ends then, or None.

    Once said it holds: Tune has been told that nothing more comes, whatever the trials that still run come to.
    """

    def __init__(self) -> None:
        self.said: str | None = None
        self._reasons: list[str] = []
        self._epochs: dict[str, int] = {}  # of each trial that was begun, the last that it is known to have come to

    def begun(self, row: Row) -> None:
        """A trial begins, or goes on."""
        self._epochs[row.trial] = row.epoch

    def reported(self, trial: str, epoch: int) -> None:
        """It came to a rung. One that is begun once more tells of the last again, which shows nothing."""
        if epoch > self._epochs[trial]:
            self._epochs[trial] = epoch
            self._reasons.clear()

    def ended(self, row: Row) -> None:
        """Of a rung that stops a trial, Tune tells this end alone."""
        if row.state != "failed":
            self._reasons.clear()
            return
        self._reasons.append(str(row.reason).replace(row.trial, "TRIAL").partition(ON_NODE)[0])
        last = self._reasons[-IN_A_ROW:]
        if len(last) == IN_A_ROW and len(set(last)) == 1:
            self.said = f"{IN_A_ROW} trials in a row failed alike: {last[0]}; mend that, and resume"
