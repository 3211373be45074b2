"""An explanation as a figure: the picture, the tokens on it, then each map over it."""

import math
import textwrap
import warnings
from io import BytesIO

import matplotlib
import PIL.Image
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .explanation import Explanation


PANEL = 3.2  # inches along the longer edge of a panel
NARROWEST = 1.6  # inches along the shorter one
COLUMNS = 4
LONGEST_EDGE = 1024  # pixels of the picture that are drawn
LINES = 3  # of the question, and of the answer, at most

# Yellow to red, the more opaque the higher the value, so that the picture is seen where a map is low
HEAT = ListedColormap(
    [(*matplotlib.colormaps["YlOrRd"](step / 255)[:3], 0.1 + 0.65 * (step / 255) ** 0.7) for step in range(256)]
)


def draw(explanation: Explanation) -> Figure:
    """See `Explanation.figure`."""
    picture = explanation.image.copy()
    picture.thumbnail((LONGEST_EDGE, LONGEST_EDGE))
    panels = 1 + (explanation.boxes is not None) + len(explanation.maps)
    rows = math.ceil(panels / COLUMNS)
    columns = math.ceil(panels / rows)
    longer = max(explanation.image.size)
    width, height = (max(PANEL * edge / longer, NARROWEST) for edge in explanation.image.size)
    width += 0.8  # of the colour bar
    title = _title(explanation, letters=int(columns * width * 11))
    size = columns * width, rows * (height + 0.4) + 0.2 * (title.count("\n") + 2)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=10, x=0.01, ha="left", parse_math=False)
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for unused in axes[panels:]:
        unused.set_visible(False)
    _picture(axes[0], picture, explanation, "picture")
    if explanation.boxes is not None:
        _tokens(axes[1], picture, explanation)
    for name, own in zip(explanation.maps, axes[panels - len(explanation.maps) :], strict=False):
        _map(figure, own, picture, explanation, name)
    return figure


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG."""
    buffer = BytesIO()
    with warnings.catch_warnings():  # letters that the font lacks are drawn as boxes
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(buffer, format="png", dpi=144)
    return buffer.getvalue()


def _title(explanation: Explanation, letters: int) -> str:
    lines = []
    for name, text in (("Question", explanation.question), ("Answer", explanation.answer or "(none)")):
        lines += textwrap.wrap(f"{name}: {text}", letters, max_lines=LINES, placeholder=" …")
    return "\n".join(lines)


def _extent(explanation: Explanation) -> tuple[int, int, int, int]:
    return 0, explanation.image.width, explanation.image.height, 0


def _picture(axes: Axes, picture: PIL.Image.Image, explanation: Explanation, title: str) -> None:
    grey = {} if picture.mode == "RGB" else {"cmap": "gray", "vmin": 0, "vmax": 255}
    left, right, bottom, top = extent = _extent(explanation)
    axes.imshow(picture, extent=extent, **grey)
    axes.set(xticks=[], yticks=[], xlim=(left, right), ylim=(bottom, top))
    axes.set_title(title, fontsize=9, parse_math=False)


def _tokens(axes: Axes, picture: PIL.Image.Image, explanation: Explanation) -> None:
    boxes, (width, height) = explanation.boxes, explanation.image.size
    _picture(axes, picture.convert("L"), explanation, f"{len(boxes)} tokens")
    corners = (boxes * torch.tensor([height, width, height, width])).tolist()
    shapes = [Rectangle((left, top), right - left, bottom - top) for top, left, bottom, right in corners]
    line = 1.2 if len(shapes) <= 64 else 0.5
    axes.add_collection(PatchCollection(shapes, facecolor="none", edgecolor="tab:red", linewidth=line))


def _map(figure: Figure, axes: Axes, picture: PIL.Image.Image, explanation: Explanation, name: str) -> None:
    values = explanation.maps[name]
    _picture(axes, picture.convert("L"), explanation, explanation.labels.get(name, name))
    shown = axes.imshow(
        values,
        extent=_extent(explanation),
        cmap=HEAT,
        vmin=0,
        vmax=float(values.max()) or 1.0,
        interpolation="nearest",
    )
    bar = figure.colorbar(shown, ax=axes, fraction=0.046, pad=0.03)
    bar.ax.tick_params(labelsize=7)
    bar.formatter.set_powerlimits((-2, 3))
    bar.ax.yaxis.get_offset_text().set_fontsize(7)
