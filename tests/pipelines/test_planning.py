"""What is too large is refused with a way out, whatever the operator's limits."""

from __future__ import annotations

import pytest

from pipelines.errors import ImageTooLarge
from pipelines.planning import plan_size


@pytest.mark.parametrize("max_pixels", [1, 10_000, 39_999])
def test_a_factor_too_large_for_any_picture_is_refused(max_pixels: int) -> None:
    """Where not even one pixel may grow by so much, the answer comes all the same."""
    with pytest.raises(ImageTooLarge) as caught:
        plan_size(30, 20, 200.0, max_pixels=max_pixels)

    assert (caught.value.max_width, caught.value.max_height) == (1, 1)


@pytest.mark.parametrize(("width", "height"), [(40, 40), (16_000, 10), (3, 5_000)])
def test_the_sides_that_are_named_are_accepted(width: int, height: int) -> None:
    """A picture of the named size passes."""
    with pytest.raises(ImageTooLarge) as caught:
        plan_size(width, height, 100.0, max_pixels=20_000, multiple=8)

    assert plan_size(caught.value.max_width, caught.value.max_height, 100.0, max_pixels=20_000, multiple=8)
