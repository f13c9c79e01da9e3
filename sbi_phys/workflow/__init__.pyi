from .run import Run as Run
from .settings import Config as Config
from .settings import LimitsSettings as LimitsSettings
from .settings import UnfoldSettings as UnfoldSettings
from .stages import run_stages as run_stages
