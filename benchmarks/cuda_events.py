"""Time of a call on a GPU, for the benchmarks beside it."""

from collections.abc import Callable

import torch

WARM_UP_CALLS = 3


def median_ms(run: Callable[[int], object], repeats: int = 20) -> float:
    """The median of CUDA events around calls, in milliseconds; ``run`` is given the number of the call."""
    for i in range(WARM_UP_CALLS):
        run(i)
    torch.cuda.synchronize()
    events = []
    for i in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run(i)
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in events)[repeats // 2]
