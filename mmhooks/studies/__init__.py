"""Case studies, one folder per study; its ``study.py`` reads like the method section of a paper.

``mm.studies.gender.run(mm.studies.gender.Options(out="runs/gender"))`` is ``mmhooks study gender --out runs/gender``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
