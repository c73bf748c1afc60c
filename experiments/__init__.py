"""What people run: each module is `python -m experiments.<name>`."""

import os
import sys
import warnings

if sys.argv[:1] == ["-m"]:  # a command: a user's matplotlibrc, even a damaged one, is not for it
    os.environ.update(MATPLOTLIBRC=os.devnull, MPLBACKEND="agg")

# Of filelock, which JAX imports too, on systems without better locks.
warnings.filterwarnings("ignore", "only soft file lock|flock not supported", UserWarning)
