"""A chest X-ray lab for research and teaching. Not for diagnosis."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # before TensorFlow is imported: its greetings are no news

__version__ = "0.1.0"
