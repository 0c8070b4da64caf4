"""`abft-fast analyze shift`: how far W_Q and W_K moved."""

from __future__ import annotations

from abft_fast.analysis.shift import shifts
from abft_fast.commands.analyze import pictures
from abft_fast.commands.analyze.models import ComparedModels
from abft_fast.commands.analyze.results import Results
from abft_fast.options import ShiftConfig
from abft_fast.runtime.progress import Progress


def shift(config: ShiftConfig, progress: Progress) -> Results:
    """Write the norms of the changes of W_Q and W_K, by layer and head.

    Raises:
        UserError: the options or the models do not allow it.
    """
    session = ComparedModels(config, progress)
    changes = session.changes()
    found = shifts(session.model, changes)
    results = Results(config.output_dir, "shift")
    results.table(
        [
            {
                "layer": each.layer,
                "projection": each.projection,
                "head": each.head,
                "change": each.change,
                "weight": each.weight,
                "relative_change": each.change / each.weight if each.weight else None,
            }
            for each in found
        ]
    )
    results.picture(pictures.shift, found)
    return results
