from .campaign import simulate as simulate
from .clusters import cluster_executor as cluster_executor
from .external import CommandSimulator as CommandSimulator
from .external import FunctionSimulator as FunctionSimulator
from .protocol import RowsFailedError as RowsFailedError
from .protocol import Simulator as Simulator
from .protocol import check_simulator as check_simulator
from .protocol import load_simulator as load_simulator
