"""A CUDA graph on the CPU: records every operation of torch, and replays it on the same tensors.

As on a GPU, what the host computes is not recorded, and reading a tensor on the host is refused.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spectraformer.captured import NotRecordable, reason_of

READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select")


class ReadsOnHost(RuntimeError):
    pass


class Recording(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation._schema.name.split("::")[1]
        if name in READS:
            raise ReadsOnHost(f"{name} reads a tensor on the host")
        result = operation(*args, **(kwargs or {}))
        self.calls.append((operation, args, kwargs or {}, result))
        return result


def simulated_graph(work):
    """Records on the CPU; raises as a recording on a GPU does."""
    recording = Recording()
    try:
        with recording:
            work()
    except ReadsOnHost as error:
        raise NotRecordable(reason_of(error)) from error

    def replay():
        with torch.no_grad():
            for operation, args, kwargs, before in recording.calls:
                if operation.is_view:
                    continue
                after = operation(*args, **kwargs)
                for old, new in zip(tree_leaves(before), tree_leaves(after), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)

    return replay
