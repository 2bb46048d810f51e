"""LoRA files of Hugging Face's peft and diffusers, read and written without either library."""

from .diffusers import from_diffusers as from_diffusers
from .diffusers import to_diffusers as to_diffusers
from .peft import from_peft as from_peft
from .peft import to_peft as to_peft
