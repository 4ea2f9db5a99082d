"""Four models, each written once in plain Flax, and how each of them is trained.

No model names a dtype; `dtype=` is for dtypes by hand.
"""

from models import bert, gpt2, resnet, transformer_xl
from models._job import Job

_MODELS = {
    "BERT-Base": bert,
    "GPT-2 small": gpt2,
    "ResNet-50": resnet,
    "Transformer-XL base": transformer_xl,
}
JOBS: dict[str, Job] = {name: model.JOB for name, model in _MODELS.items()}
TINY_JOBS: dict[str, Job] = {name: model.TINY_JOB for name, model in _MODELS.items()}

__all__ = ["JOBS", "TINY_JOBS", "Job"]
