from .loop import EpochRecord as EpochRecord
from .loop import TrainConfig as TrainConfig
from .stream import Stream as Stream
