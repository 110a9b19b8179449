from . import adversarial as adversarial
from . import attention_maps as attention_maps
from . import decomposition as decomposition
from . import gender as gender
from . import generation as generation
from . import modality as modality
from . import segmentation as segmentation
from . import spurious as spurious
