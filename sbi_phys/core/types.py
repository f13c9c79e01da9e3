"""Array types for annotations. At run time they are classes without content, so that `help()` shows `theta: ArrayLike`.

ArrayLike: anything that `numpy.asarray` takes, torch tensors included. Array: float64. Integers: int64. Mask: bool. AnyArray: any dtype.
"""

from typing import TYPE_CHECKING, Any

__all__ = ["AnyArray", "Array", "ArrayLike", "Integers", "Mask"]

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike as ArrayLike
    from numpy.typing import NDArray

    Array = NDArray[np.float64]
    Integers = NDArray[np.int64]
    Mask = NDArray[np.bool_]
    AnyArray = NDArray[Any]
else:
    # help() shows a class of the module `builtins` by its bare name
    AnyArray, Array, ArrayLike, Integers, Mask = (
        type(name, (), {"__module__": "builtins", "__doc__": "A name for annotations; see sbi_phys.core.types."}) for name in __all__
    )
