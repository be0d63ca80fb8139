"""What the libraries read when they are imported, set before they are; what the user has set stays.

It deliberately changes nothing about training.
"""

from __future__ import annotations

import logging
import os
import warnings

_DEFAULTS = {
    "HF_HUB_DISABLE_TELEMETRY": "1",  # TRL pings once per trainer; alignkit sends nothing anywhere by itself
    "TOKENIZERS_PARALLELISM": "true",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "BITSANDBYTES_NOWELCOME": "1",
}


def prepare_environment(*, tiny: bool = False) -> None:
    """Switch off pings, bars and chatter of the libraries; ALIGNKIT_DEBUG=1 leaves their warnings on.

    A `tiny` (built-in) model computes with one thread: its matrices are so small that threads only wait for each other.
    """
    if tiny:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    if os.environ.get("ALIGNKIT_DEBUG") != "1":
        warnings.simplefilter("ignore")  # upstream deprecations are ours to mend, not the user's
        # One line for each int8 matrix product otherwise.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
