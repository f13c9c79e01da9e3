from .classifier import ClassifierConfig as ClassifierConfig
from .embedding_set import DeepSet as DeepSet
from .embedding_set import SetAttention as SetAttention
from .embedding_set import pad_sets as pad_sets
from .embedding_vector import EmbeddingConfig as EmbeddingConfig
from .embedding_vector import ResidualMLP as ResidualMLP
from .flow import FlowConfig as FlowConfig
