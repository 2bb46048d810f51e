"""LoRA files of peft, diffusers, kohya's scripts and LyCORIS, read and written without any of these."""

from .diffusers import from_diffusers as from_diffusers
from .diffusers import to_diffusers as to_diffusers
from .kohya import from_kohya as from_kohya
from .kohya import to_kohya as to_kohya
from .peft import from_peft as from_peft
from .peft import to_peft as to_peft
