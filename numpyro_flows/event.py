"""An event on its way through the layers of a flow."""

from typing import Any, NamedTuple

from jax import Array

from numpyro_flows.partition import Partition


class Event(NamedTuple):
    """An event on its way through a flow: whole, or as the two parts of a partition.

    A run of couplings on one partition passes the parts on as they are, so that they are split
    once before the run and joined once after it.
    """

    value: Any
    partition: Partition | None = None
    context: Array | None = None

    def whole(self) -> Array:
        """Return the event as one array."""
        return self.value if self.partition is None else self.partition.join(*self.value)

    def parts(self, partition: Partition) -> tuple[Array, Array]:
        """Return the event as the two parts of `partition`."""
        if self.partition is not None:
            if self.partition == partition:
                return self.value
            if self.partition == partition.swap:
                return self.value[1], self.value[0]
        return partition.split(self.whole())

    def to(self, value: Any, partition: Partition | None = None) -> "Event":
        """Return the event with a new value and the same context."""
        return Event(value, partition, self.context)
