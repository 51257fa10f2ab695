"""The fallback of a run that is out of memory: the next knob that takes less and trains the same.

What costs no time comes first, what costs most comes last (`recipe/moves.py` states the order). Each keeps what is
trained, as `run_folder/resumption.py` sees it, so the checkpoint of the last good step is not lost.
"""

from qlora_lowmem.plan.asked import runs_in_tiles
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.recipe.moves import Change, changes_of


def next_fallback(recipe: Recipe) -> Change | None:
    """The first change of the order that `recipe` can make; None where there is none left.

    What would switch another of its knobs off is passed over: that is a choice of the person's own.
    """
    changes = changes_of(recipe, tiles=runs_in_tiles(recipe))
    return next((each for each in changes if each.keeps_training and False not in each.changes.values()), None)
