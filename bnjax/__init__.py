"""bnjax: the laboratory for batch normalization in JAX."""

from bnjax import cs231n as cs231n
from bnjax import data as data
from bnjax import diagnostics as diagnostics
from bnjax import functional as functional
from bnjax import initializers as initializers
from bnjax import layers as layers
from bnjax import models as models
from bnjax import moments as moments
from bnjax import norms as norms
from bnjax import paired as paired
from bnjax import parallel as parallel
from bnjax import population as population
from bnjax import statistics as statistics
from bnjax import torch_interop as torch_interop
from bnjax import training as training
from bnjax import variants as variants
from bnjax.layers import BatchNorm as BatchNorm
from bnjax.version import __version__ as __version__
