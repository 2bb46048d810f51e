"""The methods, one file each; importing one registers it. `residual_adapter` brings `tsa` before it."""

from . import selective as selective  # isort: skip - the order here is the order of `medpeft.methods()`
from . import adaptformer as adaptformer
from . import bottleneck as bottleneck
from . import conv_adapter as conv_adapter
from . import convpass as convpass
from . import difffit as difffit
from . import dtl as dtl
from . import fact as fact
from . import ia3 as ia3
from . import loha as loha
from . import lokr as lokr
from . import lora as lora
from . import lst as lst
from . import miss as miss
from . import mona as mona
from . import oft as oft
from . import prefix as prefix
from . import repadapter as repadapter
from . import residual_adapter as residual_adapter
from . import shira as shira
from . import ssf as ssf
from . import svdiff as svdiff
from . import tsa as tsa
from . import vera as vera
from . import vpt as vpt
