"""What `check_invertible` returns."""

from typing import NamedTuple


class Invertibility(NamedTuple):
    """Result of `check_invertible`.

    Args:
        error: the largest `|x - flow(flow.inv(x))| / max(1, |x|)`, where |x| is the largest entry
            of the row.
        ladj_error: the largest absolute value, in nats, of the sum of the log-determinants of
            `flow.inv` and of `flow` on the way back.
    """

    error: float
    ladj_error: float
