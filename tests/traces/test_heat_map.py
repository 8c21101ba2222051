"""The picture of changed routers shows its numbers under the names of their steps and layers."""

import warnings

import numpy as np
import pytest

from trl_r3.traces.heat_map import changed_routers

STEPS, LAYERS, EDGE = [0, 5, 10], [1, 3], 0.2


@pytest.mark.parametrize("largest", [0.1, 0.9])
def test_shares_steps_and_layers(largest):
    changed = np.array([[0.0, 0.05, 0.1], [largest / 2, largest, np.nan]])
    figure = changed_routers(STEPS, LAYERS, changed, EDGE)
    axes, bar = figure.axes
    (image,) = axes.images
    np.testing.assert_array_equal(np.ma.filled(image.get_array(), np.nan), changed)
    assert image.origin == "lower"
    names = [[axis.get_major_formatter()(at, None) for at in range(-1, 4)] for axis in (axes.xaxis, axes.yaxis)]
    assert names == [["", "0", "5", "10", ""], ["", "1", "3", "", ""]]
    # what is healthy is in the bar, however small or large the shares are
    assert image.get_clim() == (0, max(1.25 * EDGE, largest))
    assert bar.lines[-1].get_ydata()[0] == EDGE < image.get_clim()[1]


def test_nothing_known_is_drawn():
    """A run may have compared nothing so far."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = changed_routers(STEPS, LAYERS, np.full((2, 3), np.nan), EDGE)
        figure.canvas.draw()
    assert figure.axes[0].images[0].get_clim() == (0, 1.25 * EDGE)
