"""Models that cannot be specialised: the problems of their fused ops are measured all the same.

The fused model is run once on the example, and each fused op that runs is seen with its arguments.
What is measured then goes into the tuned table, from which the fused model chooses its kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fused_resnet import backends
from fused_resnet.op_watcher import Operands, OpWatcher
from fused_resnet.planner import Progress, Settings, measure_all
from fused_resnet.source import Source
from fused_resnet.tuned_table import TunedTable
from fused_resnet.tuning import EFFORTS, Task, is_current

_STEM = "conv_affine_relu_maxpool"


class _Recorder(OpWatcher):
    """Keeps one task for each problem."""

    def __init__(self) -> None:
        super().__init__()
        self.tasks: dict[tuple[str, object], Task] = {}

    def saw(self, choice: backends.Choice, operands: Operands, result: Any) -> None:
        """See `OpWatcher`."""
        # The stem's op has no residual, kernels take one all the same.
        given = [*operands, None] if choice.kernel.op == _STEM else operands
        task = Task(choice.kernel.op, choice.problem, choice.device, tuple(given))
        self.tasks.setdefault((task.op, task.problem), task)


def tune_in_place(
    source: Source,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    settings: Settings,
    table: TunedTable,
    progress: Progress,
) -> None:
    """Measure the problems of all fused ops that run for these arguments; see the module."""
    recorder = _Recorder()
    with torch.inference_mode(False), torch.no_grad(), recorder:
        source(*args, **kwargs)
    effort = EFFORTS[settings.mode]
    wanted = []
    for task in recorder.tasks.values():
        entry = table.entry(task.op, task.problem, task.device)
        if entry is None or not is_current(entry, task, effort):
            wanted.append(task)
    measure_all(wanted, settings, table, progress)


__all__ = ["tune_in_place"]
