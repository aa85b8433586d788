"""What the plots share: the import of matplotlib, colours."""

from keras_halo.utils.extras import require

# Ten colours that stay apart with every common form of colour blindness
# (Matthew A. Petroff, Accessible Color Sequences for Data Visualization,
# 2021). The first six, from which lines are drawn, come before the others
# because they stand out from white as well as from black.
PALETTE = (
    "#3f90da",
    "#e76300",
    "#bd1f01",
    "#832db6",
    "#a96b59",
    "#717581",
    "#94a4a2",
    "#b9ac70",
    "#ffa90e",
    "#92dadd",
)

KNOWN_COLOR = PALETTE[0]

LINE_STYLES = ("-", "--", "-.", ":")


def import_pyplot():
    """Returns `matplotlib.pyplot`, or says how to install it."""
    return require("matplotlib.pyplot")


def axes_or_new(ax):
    """Returns `ax`, or the axes of a new figure if it is `None`."""
    plt = import_pyplot()
    if ax is None:
        _, ax = plt.subplots(layout="constrained")
    elif not hasattr(ax, "scatter"):
        raise ValueError(
            "`ax` must be matplotlib Axes or None. Received: ax of type "
            f"{type(ax).__name__}. Of a grid of axes pass one, such as "
            "`axes[0]`; of a figure, `figure.gca()`."
        )
    return ax


def text_color():
    """Colour of text in the style in force: dark on light, light on dark."""
    return import_pyplot().rcParams["text.color"]


def outlined(ax):
    """Path effects that keep text readable on top of points."""
    import matplotlib.patheffects as effects

    return [effects.withStroke(linewidth=2.5, foreground=ax.get_facecolor())]


def unknown_style(index):
    """Colour and line style of the unknown set with this number."""
    colors = PALETTE[1:]
    return {
        "color": colors[index % len(colors)],
        "linestyle": LINE_STYLES[(index // len(colors)) % len(LINE_STYLES)],
    }
