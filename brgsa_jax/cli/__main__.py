"""`python -m brgsa_jax.cli`, for a checkout that is not installed."""

import sys

from brgsa_jax.cli import main

sys.exit(main())
