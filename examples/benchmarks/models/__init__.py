"""Four models, each written once in plain Flax, and how each of them is trained.

No model names a dtype. `dtype=` is there for those who write dtypes by hand.
"""

from models import bert, gpt2, resnet, transformer_xl
from models._job import Job

JOBS = {
    "BERT-Base": bert.JOB,
    "GPT-2 small": gpt2.JOB,
    "ResNet-50": resnet.JOB,
    "Transformer-XL base": transformer_xl.JOB,
}
TINY_JOBS = {
    "BERT-Base": bert.TINY_JOB,
    "GPT-2 small": gpt2.TINY_JOB,
    "ResNet-50": resnet.TINY_JOB,
    "Transformer-XL base": transformer_xl.TINY_JOB,
}

__all__ = ["JOBS", "TINY_JOBS", "Job"]
