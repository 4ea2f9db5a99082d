"""The zoo: small networks of every sort, a list to cross with properties under test.

Each network has inputs, a loss, the rules that its users would add, and two forms:
linen and nnx, with the same paths, so that the same rules serve both. `functional`
gives the two forms one interface.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxmp.policy import Policy, PolicyRule, default_rules
from jaxmp.testing import _zoo_linen, _zoo_nnx
from jaxmp.testing._functional import Record, split_linen, split_nnx

Rules = tuple[PolicyRule, ...]


def _default_rules(policy: Policy) -> Rules:
    """Returns the default rules, whatever the policy."""
    del policy
    return default_rules


@dataclasses.dataclass(frozen=True, eq=False)
class ZooModel:
    """A network of the zoo.

    Attributes:
      name: the same for both forms, such as `"mlp"`.
      kind: `"linen"` or `"nnx"`.
      make: returns a new module.
      inputs: the arguments of a call.
      target: what `loss` compares the output with.
      loss: a function `(output, target)` that returns a float32 scalar.
      rules: a function from a policy to the rules to apply it with.
      frozen: a regular expression for the paths of parameters that are not trained.
    """

    name: str
    kind: str
    make: Callable[[], Any]
    inputs: tuple[np.ndarray, ...]
    target: Any
    loss: Callable[[Any, Any], jax.Array]
    rules: Callable[[Policy], Rules] = _default_rules
    frozen: str = ""

    def __str__(self) -> str:
        return f"{self.name}-{self.kind}"

    def functional(
        self, module: Any, record: Record | None = None
    ) -> tuple[Callable[..., Any], Any, Any]:
        """Splits a module into a function, parameters and state.

        Args:
          module: from `make`, abstract or not, with or without a policy applied.
          record: a dictionary to which every trace adds the outputs of every layer, as
            `jax.ShapeDtypeStruct`, under the layer's path.

        Returns:
          A function `(params, state, *inputs)` that returns the output and the new
          state; the parameters; and the state: statistics, caches and keys. Their
          values depend on the path alone, not on the module, and so are the same for
          linen and nnx.
        """
        record = {} if record is None else record
        if self.kind == "linen":
            return split_linen(module, self.inputs, record)
        return split_nnx(module, record)


@functools.cache
def zoo() -> tuple[ZooModel, ...]:
    """Returns the networks of the zoo, each in linen and in nnx.

    Returns:
      A tuple of `ZooModel`s.

    Example:
      >>> from jaxmp.testing import zoo
      >>> model = zoo()[0]
      >>> str(model), [x.shape for x in model.inputs]
      ('mlp-linen', [(8, 64)])
    """
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    def integers(low, high, *shape):
        return rng.integers(low, high, size=shape, dtype=np.int32)

    images, labels = normal(8, 8, 8, 1), integers(0, 10, 8)
    rows, flat = images[..., 0], images.reshape(8, 64)
    tokens = integers(0, 20, 2, 12)
    lengths = np.array([12, 7], np.int32)

    return (
        *_both("mlp", "MLP", (flat,), labels, cross_entropy),
        *_both("cnn", "CNN", (images,), labels, cross_entropy),
        *_both("resnet", "ResNet", (normal(8, 16, 16, 1),), labels, cross_entropy),
        *_both(
            "conv3d",
            "Conv3D",
            (normal(2, 4, 8, 8, 1),),
            integers(0, 3, 2),
            cross_entropy,
        ),
        *_both("lstm", "Recurrent", (rows,), labels, cross_entropy, cell="LSTMCell"),
        *_both("gru", "Recurrent", (rows,), labels, cross_entropy, cell="GRUCell"),
        *_both(
            "encoder", "Encoder", (tokens, lengths), integers(0, 4, 2), cross_entropy
        ),
        *_both("decoder", "Decoder", (tokens,), tokens, next_token),
        *_both(
            "decoder_cached",
            "Decoder",
            (tokens[:, :1], np.int32(0)),
            tokens[:, 0],
            cross_entropy,
            decode=True,
        ),
        *_both("transformer_xl", "TransformerXL", (tokens,), tokens, next_token),
        *_both("mixture_of_experts", "MixtureOfExperts", (flat,), labels, with_balance),
        *_both(
            "recommender",
            "Recommender",
            (integers(0, 1000, 8, 3), normal(8, 5)),
            integers(0, 2, 8),
            clicks,
        ),
        *_both("speech", "Speech", (normal(2, 16, 12),), integers(1, 6, 2, 3), ctc),
        *_both("autoencoder", "Autoencoder", (images,), images, squared_error),
        *_with_half_parameters(
            "teacher(/.*)?",
            "teacher/.*",
            _both("distillation", "Distillation", (flat,), labels, soft_targets),
        ),
        *_with_half_parameters(
            ".*/base_module",
            ".*/base_module/.*",
            _both("lora", "LoRA", (flat,), labels, cross_entropy),
        ),
    )


def _both(
    name: str,
    cls: str,
    inputs: tuple[Any, ...],
    target: Any,
    loss: Callable[[Any, Any], jax.Array],
    **arguments: Any,
) -> Iterator[ZooModel]:
    """A network in linen and in nnx, with these arguments for its class."""

    def make_linen() -> Any:
        return getattr(_zoo_linen, cls)(**arguments)

    def make_nnx() -> Any:
        return getattr(_zoo_nnx, cls)(**arguments, rngs=nnx.Rngs(0))

    yield ZooModel(name, "linen", make_linen, inputs, target, loss)
    yield ZooModel(name, "nnx", make_nnx, inputs, target, loss)


def _with_half_parameters(
    modules: str, frozen: str, models: Iterator[ZooModel]
) -> Iterator[ZooModel]:
    """Networks whose frozen modules store their parameters in the compute dtype."""

    def rules(policy: Policy) -> Rules:
        return (PolicyRule(path=modules, params=policy.compute_dtype), *default_rules)

    for model in models:
        yield dataclasses.replace(model, rules=rules, frozen=frozen)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy in float32."""
    logits = jnp.asarray(logits, jnp.float32).reshape(*labels.shape, -1)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def next_token(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Mean cross-entropy of each next token."""
    return cross_entropy(logits[:, :-1], tokens[:, 1:])


def with_balance(output: tuple[jax.Array, jax.Array], labels: jax.Array) -> jax.Array:
    """Cross-entropy plus the balancing loss of a mixture of experts."""
    logits, balance = output
    return cross_entropy(logits, labels) + 0.01 * jnp.asarray(balance, jnp.float32)


def clicks(logits: jax.Array, clicked: jax.Array) -> jax.Array:
    """Mean binary cross-entropy, in float32."""
    logits = jnp.asarray(logits, jnp.float32)
    return optax.sigmoid_binary_cross_entropy(logits, clicked).mean()


def ctc(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean CTC loss over sequences of full length, in float32."""
    logits = jnp.asarray(logits, jnp.float32)
    no_padding = jnp.zeros(logits.shape[:2]), jnp.zeros(labels.shape)
    return optax.ctc_loss(logits, no_padding[0], labels, no_padding[1]).mean()


def squared_error(output: jax.Array, target: jax.Array) -> jax.Array:
    """Mean squared error, in float32."""
    return jnp.mean(jnp.square(jnp.asarray(output, jnp.float32) - target))


def soft_targets(output: tuple[jax.Array, jax.Array], labels: jax.Array) -> jax.Array:
    """Cross-entropy with the labels and with the teacher's softened output."""
    student, teacher = (jnp.asarray(x, jnp.float32) for x in output)
    soft = optax.softmax_cross_entropy(student / 2, jax.nn.softmax(teacher / 2))
    return cross_entropy(student, labels) + 4 * soft.mean()
