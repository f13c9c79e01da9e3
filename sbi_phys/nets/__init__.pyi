from .classifier import ClassifierConfig as ClassifierConfig
from .embed import EmbeddingConfig as EmbeddingConfig
from .embed import ResidualMLP as ResidualMLP
from .flow import FlowConfig as FlowConfig
from .sets import DeepSet as DeepSet
from .sets import SetAttention as SetAttention
from .sets import pad_sets as pad_sets
