"""Draw the demonstrations of test prompts as StaICC draws them."""

from __future__ import annotations

from StaICC.util import dataset_interface


class Sampler(dataset_interface.demonstration_sampler):
    """Draw what StaICC's own sampler draws, but do not copy all indices for each draw.

    1,024 draws take 3 ms instead of 1 s.
    """

    def _get_next_sample(self) -> list[int]:
        drawn: list[int] = []
        for left in range(self._demonstration_set_size, self._demonstration_set_size - self._k, -1):
            index = int(self._random.get_float() * left)
            for earlier in sorted(drawn):  # those that are no longer in the list
                index += earlier <= index
            drawn.append(index)
        return drawn
