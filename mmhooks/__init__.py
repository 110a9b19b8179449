"""mmhooks: hooked-model mechanistic interpretability for multimodal models.

Public names are imported on first use, so ``import mmhooks`` costs little more than importing torch.
``__init__.pyi`` lists them, both for type checkers and for the lazy import.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __lazy_dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["__version__"]


def __dir__() -> list[str]:
    return [*__all__]
