"""No words of the libraries on a screen that is ours."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The libraries' warnings and bars are about their own defaults, which nobody who reads our screen has chosen."""
    from datasets import utils as bars_of_datasets
    from transformers.utils import logging as hf_logging

    level, had_bars = hf_logging.get_verbosity(), not bars_of_datasets.are_progress_bars_disabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    bars_of_datasets.disable_progress_bars()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        hf_logging.set_verbosity(level)
        hf_logging.enable_progress_bar()
        if had_bars:
            bars_of_datasets.enable_progress_bars()
