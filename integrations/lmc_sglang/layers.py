"""What SGLang's pools ask before a forward reads a layer: the counter of loads by layers, which
makes the engine wait for the layer it is about to read. On a CPU that is the thread of the forward,
on a GPU the stream it puts its work into. Owned by the scheduler thread, which runs the forwards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmc.transfer import Job


class LayerCounter:
    """The loads of batches by number; `compat.COUNTER_NAMES` are SGLang's.

    A load that failed lets the forward go on with whatever the pages hold: its verdict comes after
    the forward was begun, and SGLang drops the output.
    """

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self.consumer_index = -1
        self._begun = 0
        self._jobs: dict[int, Job] = {}

    def begin(self, job: Job) -> int:
        """The number of a batch's load."""
        index = self._begun
        self._begun += 1
        self._jobs[index] = job
        return index

    def end(self, index: int) -> None:
        """The forward of this batch was begun."""
        self._jobs.pop(index, None)

    def reset(self) -> None:
        self.consumer_index = -1
        self._jobs.clear()

    # --- what SGLang calls

    def set_consumer(self, index: int) -> None:
        """The batch whose forward begins; -1 where it loads nothing."""
        self.consumer_index = index

    def wait_until(self, layer: int) -> None:
        """The forward reads a layer, counted from the first of this rank."""
        self.let_wait(self.consumer_index, layer)

    def let_wait(self, index: int, layer: int) -> None:
        """What the engine does from now on comes after a layer of a batch's load."""
        job = self._jobs.get(index)
        if job is not None:
            job.let_wait(layer)

    @property
    def events(self) -> _Events:
        """For a draft model fused with another: `events[index].wait(layer)`."""
        return _Events(self)


class _Events:
    def __init__(self, counter: LayerCounter) -> None:
        self._counter = counter

    def __getitem__(self, index: int) -> _Event:
        return _Event(self._counter, index)


class _Event:
    def __init__(self, counter: LayerCounter, index: int) -> None:
        self._counter, self._index = counter, index

    def wait(self, layer: int) -> None:
        self._counter.let_wait(self._index, layer)
