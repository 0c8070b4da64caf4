"""The style of pictures: colors, the same bytes, and one line where its packages are missing."""

import itertools
import subprocess
import sys
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from abft_fast import plots
from abft_fast.errors import UserError
from abft_fast.plots import style

pytestmark = pytest.mark.unit

# Machado et al. 2009, severity 1: what three kinds of dichromats see, in linear RGB.
VISION = {
    "usual": np.eye(3),
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritanopia": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(color):
    channels = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def cielab(rgb):
    x, y, z = np.cbrt(TO_XYZ @ np.clip(rgb, 1e-4, 1) / [0.9505, 1.0, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("background", ["#ffffff", "#0d1117"])
@pytest.mark.parametrize(("color", "least"), [(style.GREY, 4.3), *((c, 3) for c in style.COLORS)])
def test_colors_stand_out_on_light_and_dark(color, least, background):
    """WCAG's contrast: 3 for graphics; one grey cannot reach text's 4.5 on both."""
    dark, light = sorted(TO_XYZ[1] @ linear(c) for c in (color, background))
    assert (light + 0.05) / (dark + 0.05) >= least


@pytest.mark.parametrize("vision", VISION)
def test_colors_are_apart_for_every_kind_of_vision(vision):
    """In CIELAB a distance of 2.3 is just noticed; 20 is plain for thin lines too."""
    seen = [cielab(np.array(VISION[vision]) @ linear(color)) for color in style.COLORS]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) >= 20


def picture():
    with style.applied():
        figure = Figure((3, 2))
        axes = figure.subplots()
        axes.plot([0, 1], [0, 2], label="gain")
        axes.set(xlabel="step", ylabel="accuracy (%)")
        axes.legend()
    return figure


def test_saved_is_text_the_same_bytes_and_without_background(tmp_path):
    style.save(picture(), tmp_path / "a.svg")
    with matplotlib.rc_context({"text.color": "red", "svg.fonttype": "path"}):
        style.save(picture(), tmp_path / "b.svg")
    content = (tmp_path / "a.svg").read_text()
    assert content == (tmp_path / "b.svg").read_text()
    texts = [e.text for e in ElementTree.fromstring(content).iter() if e.tag.endswith("}text")]
    assert {"step", "accuracy (%)", "gain"} <= set(texts)
    assert "#ffffff" not in content and "<dc:date>" not in content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.svg", "b.svg"]


def test_settings_of_the_user_are_there_again_after_a_picture():
    with matplotlib.rc_context({"axes.edgecolor": "red"}):
        style.svg(picture())
        assert matplotlib.rcParams["axes.edgecolor"] == "red"


@pytest.mark.parametrize("name", plots.NEEDED)
def test_a_missing_package_is_one_line_that_names_the_extra(name, monkeypatch):
    plots.check_installed("abft-fast report")
    monkeypatch.setattr(plots, "NEEDED", (*plots.NEEDED, f"{name}_that_is_not_there"))
    with pytest.raises(
        UserError, match=rf"^abft-fast report needs {name}_.*'abft-fast\[plots\]'`$"
    ):
        plots.check_installed("abft-fast report")


def test_the_check_imports_no_package_of_the_extra():
    code = (
        "import sys, abft_fast.plots as plots; plots.check_installed('x')\n"
        "assert not {'matplotlib', 'jinja2', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
