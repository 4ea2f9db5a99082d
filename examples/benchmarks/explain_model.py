"""Prints what autocast decides about the loss of a model, and what islands keep.

    python examples/benchmarks/explain_model.py --model ResNet-50

The four models are those of `memory_table.py`. Nothing is compiled or run: the loss is
traced on abstract arrays.
"""

import argparse

import ways
from compiled_steps import abstract_arguments
from models import JOBS

import jaxmp


def explain(name: str, policy: str) -> jaxmp.casting.Explanation:
    """What autocast decides about the loss of a model."""
    job = JOBS[name]
    model = job.model(dtype=None)
    state, batch = abstract_arguments(ways.plain(job), job)
    loss_fn = ways.loss_function(job, model)
    return jaxmp.explain(loss_fn, policy)(state.params, state.variables, batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="GPT-2 small", choices=list(JOBS))
    parser.add_argument("--policy", default="mixed_bfloat16")
    arguments = parser.parse_args()
    found = explain(arguments.model, arguments.policy)
    print(found.summary, *found.formats, *found.backward, sep="\n")


if __name__ == "__main__":
    main()
