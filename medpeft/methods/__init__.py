"""The methods, one file each; importing one registers it."""

from . import selective as selective  # isort: skip - the order here is the order of `medpeft.methods()`
from . import tsa as tsa
from . import ssf as ssf
from . import lora as lora
from . import adaptformer as adaptformer
from . import svdiff as svdiff
