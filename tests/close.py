"""Compare figures up to rounding, where some may be None: a share that no prompt has."""

import pytest


def close(expected, rel):
    """What equals a figure, or a dict of figures, up to a relative error; None equals None."""
    if isinstance(expected, dict):
        return {name: close(value, rel) for name, value in expected.items()}
    return None if expected is None else pytest.approx(expected, rel=rel)
