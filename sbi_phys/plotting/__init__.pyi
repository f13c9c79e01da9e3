from .style import PALETTE as PALETTE
from .style import finish as finish
from .style import house_style as house_style
from .style import new_axes as new_axes
from .style import new_figure as new_figure
from .style import save_figure as save_figure
