"""The models of the style files, each with inputs, and a loss in float32."""

import functools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxmp

from . import styles_linen as linen
from . import styles_linen_more as more
from . import styles_nnx, styles_other
from .measures import weights


class Style(NamedTuple):
    """A way in which public models are written.

    Attributes:
      name: what it is called in the tests.
      make: returns the module; or, where it is no module of Flax, its weights.
      inputs: what the model is called with.
      loss: function of its output; or, where it is none, of weights and inputs.
    """

    name: str
    make: Callable[[], Any]
    inputs: tuple[Any, ...]
    loss: Callable[..., Any]

    @property
    def is_module(self) -> bool:
        return "-" in self.name

    def prepare(self, way: str | None, policy: str) -> tuple[Any, Any]:
        """Its loss `(params, state) -> scalar` in some way, and `(params, state)`."""
        key = zlib.crc32(self.name.encode())
        if not self.is_module:
            loss, variables = _of_function(self, key)
        else:
            module = self.make()
            if way == "apply_policy":
                module = jaxmp.apply_policy(module, policy)
            take_apart = _of_linen if isinstance(module, nn.Module) else _of_nnx
            loss, variables = take_apart(self, module, key)
        return (jaxmp.autocast(loss, policy) if way == "autocast" else loss), variables


def _of_linen(style: Style, module: nn.Module, seed: int) -> tuple[Any, Any]:
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    state = weights(jax.eval_shape(module.init, keys, *style.inputs), seed)
    params = state.pop("params")

    def loss(params: Any, state: Any) -> Any:
        variables = {"params": params, **state}
        rngs = {"dropout": jax.random.key(1)}
        output, _ = module.apply(
            variables, *style.inputs, rngs=rngs, mutable=[*state, "intermediates"]
        )
        return style.loss(output)

    return loss, (params, state)


def _of_nnx(style: Style, module: Any, seed: int) -> tuple[Any, Any]:
    graph, params, state = nnx.split(module, nnx.Param, ...)

    def loss(params: Any, state: Any) -> Any:
        return style.loss(nnx.merge(graph, params, state, copy=True)(*style.inputs))

    return loss, (weights(params, seed), weights(state, seed))


def _of_function(style: Style, seed: int) -> tuple[Any, Any]:
    def loss(params: Any, state: Any) -> Any:
        del state
        return style.loss(params, *style.inputs)

    return loss, (weights(style.make(), seed), {})


def _cross_entropy(labels: Any) -> Callable[[Any], Any]:
    def loss(logits: Any) -> Any:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean()

    return loss


def _squared_error(target: Any) -> Callable[[Any], Any]:
    return lambda output: jnp.mean((output - target) ** 2)


def _ppo(actions: Any, advantages: Any, returns: Any) -> Callable[[Any], Any]:
    """The clipped objective of a first step, with the entropy and the value."""

    def loss(output: Any) -> Any:
        log_probabilities, values = output
        taken = jnp.take_along_axis(log_probabilities, actions[:, None], 1)[:, 0]
        ratio = jnp.exp(taken - jnp.log(1 / 6))
        clipped = jnp.clip(ratio, 0.8, 1.2)
        gain = jnp.minimum(ratio * advantages, clipped * advantages).mean()
        entropy = -jnp.sum(jnp.exp(log_probabilities) * log_probabilities, -1).mean()
        return jnp.mean((values - returns) ** 2) - gain - 0.01 * entropy

    return loss


def _ctc(letters: Any) -> Callable[[Any], Any]:
    def loss(logits: Any) -> Any:
        padding = jnp.zeros(logits.shape[:2])
        nothing = jnp.zeros(letters.shape)
        return optax.ctc_loss(logits, padding, letters, nothing).mean() / 10

    return loss


def _with_balance(labels: Any) -> Callable[[Any], Any]:
    return lambda output: _cross_entropy(labels)(output[0]) + 0.01 * output[1]


def _clicks(clicked: Any) -> Callable[[Any], Any]:
    return lambda x: optax.sigmoid_binary_cross_entropy(x, clicked).mean()


def _equinox(images: Any, labels: Any) -> Style:
    make = functools.partial(styles_other.EquinoxViT, jax.random.key(0))
    shapes = eqx.filter_eval_shape(make)
    dynamic, static = eqx.partition(shapes, lambda x: hasattr(x, "dtype"))

    def loss(params: Any, images: Any) -> Any:
        return _cross_entropy(labels)(jax.vmap(eqx.combine(params, static))(images))

    return Style("equinox", lambda: dynamic, (jnp.moveaxis(images, -1, 1),), loss)


def _haiku(images: Any, labels: Any) -> Style:
    def net() -> Any:
        hk = pytest.importorskip("haiku", reason="dm-haiku is not installed")
        return hk.without_apply_rng(hk.transform(styles_other.haiku_net))

    def make() -> Any:
        return jax.eval_shape(net().init, jax.random.key(0), images)

    def loss(params: Any, images: Any) -> Any:
        return _cross_entropy(labels)(net().apply(params, images))

    return Style("haiku", make, (images,), loss)


def _radiance(points: Any, distances: Any, colors: Any) -> Style:
    def loss(params: Any, points: Any, distances: Any) -> Any:
        rendered = styles_other.radiance(params, points, distances)
        return jnp.mean((rendered - colors) ** 2)

    make = styles_other.radiance_shapes
    return Style("functions", make, (points, distances), loss)


@functools.cache
def styles() -> dict[str, Style]:
    """All styles by name; those of Flax are called after the library first."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    def integers(below: int, *shape: int) -> Any:
        return jnp.asarray(rng.integers(0, below, shape), jnp.int32)

    words, images, labels = integers(64, 4, 20), normal(4, 16, 16, 3), integers(10, 4)
    spoken = _cross_entropy(jnp.roll(words, -1, 1))
    named = _cross_entropy(labels)
    rows = normal(4, 32)
    frames = integers(256, 8, 20, 20, 4).astype(jnp.uint8)
    edges = integers(20, 60), integers(20, 60)
    sound, volumes = normal(2, 40, 12), normal(2, 8, 8, 8, 1)
    bags, clicks = (integers(5000, 8, 3, 4), normal(8, 5)), integers(2, 8)
    model, config = linen.LanguageModel, linen.Config()
    build, rngs = nnx.eval_shape, functools.partial(nnx.Rngs, 0)

    def nnx_style(name: str, cls: Any, first: Any, inputs: Any, loss: Any) -> Style:
        make = functools.partial(build, lambda: cls(first, rngs=rngs()))
        return Style(f"nnx-{name}", make, inputs, loss)

    found = (
        Style("linen-config", lambda: model(config), (words,), spoken),
        Style(
            "linen-struct_config_scan",
            lambda: model(linen.StructConfig(), loop="scan"),
            (words,),
            spoken,
        ),
        Style(
            "linen-config_dict_remat",
            lambda: model(linen.settings(), loop="remat"),
            (words,),
            spoken,
        ),
        Style("linen-partial", linen.Mixer, (images,), named),
        Style("linen-setup", linen.InSetup, (images,), named),
        Style("linen-field_default", linen.FieldDefault, (images,), named),
        Style("linen-class_default", linen.ClassDefault, (rows,), named),
        Style(
            "linen-loss_inside",
            linen.WithLoss,
            (words, jnp.roll(words, -1, 1)),
            lambda loss: loss,
        ),
        Style(
            "linen-graph",
            linen.GraphNet,
            (normal(20, 8), *edges),
            _cross_entropy(integers(4, 20)),
        ),
        Style(
            "linen-actor_critic",
            linen.ActorCritic,
            (frames,),
            _ppo(integers(6, 8), normal(8), normal(8)),
        ),
        Style(
            "linen-unet",
            more.UNet,
            (images, integers(1000, 4)),
            _squared_error(normal(4, 16, 16, 3)),
        ),
        Style("linen-experts", more.Experts, (rows,), _with_balance(labels)),
        Style("linen-speech", more.Speech, (sound,), _ctc(integers(6, 2, 5) + 1)),
        Style(
            "linen-volumes",
            more.Volumes,
            (volumes,),
            _cross_entropy(integers(3, 2, 8, 8, 8)),
        ),
        Style("linen-recommender", more.Recommender, bags, _clicks(clicks)),
        nnx_style(
            "stacked_tied",
            styles_nnx.LanguageModel,
            styles_nnx.Config(),
            (words,),
            spoken,
        ),
        nnx_style("adapted", styles_nnx.Adapted, jnp.float32, (rows,), named),
        nnx_style(
            "decoder",
            styles_nnx.Decoder,
            jnp.float32,
            (words[:, :1],),
            _cross_entropy(words[:, 1:2]),
        ),
        nnx_style("conv", styles_nnx.ConvNet, jnp.float32, (images,), named),
        _equinox(images, labels),
        _haiku(images, labels),
        _radiance(normal(8, 16, 3), abs(normal(8, 16)) / 8, abs(normal(8, 3)) / 2),
    )
    return {style.name: style for style in found}
