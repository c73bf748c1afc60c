"""What people run: each module is `python -m experiments.<name>`."""

import warnings

# Of filelock, which JAX imports too, on systems without better locks.
warnings.filterwarnings("ignore", "only soft file lock|flock not supported", UserWarning)
