"""The Flax models of transformers, one tiny configuration for each architecture."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import transformers

VOCABULARY, CLASSES, BATCH, LENGTH = 64, 5, 4, 20
# As every library names its own sizes, so every family has its own words for "tiny".
BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "forced_eos_token_id": None,
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 1,
    "num_decoder_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
LLAMA = {**BERT, "num_key_value_heads": 1, "head_dim": 16}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 128,
}
VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": CLASSES,
}
STAGES = {
    "embedding_size": 8,
    "hidden_sizes": [16, 32],
    "depths": [1, 1],
    "num_labels": CLASSES,
}
WAV2VEC2 = {
    **BERT,
    "conv_dim": (16, 16),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    # Its mask of time steps is drawn by NumPy, outside of the program.
    "mask_time_prob": 0.0,
}
CLIP = {
    "text_config": {**BERT, "eos_token_id": VOCABULARY - 1},
    "vision_config": VIT,
    "projection_dim": 16,
}


class Architecture(NamedTuple):
    """One of the models that transformers has in Flax.

    Attributes:
      name: as transformers' mappings of Flax models call it.
      model: the class of the model with a head that has a loss.
      sizes: what is tiny about it; or for models made of two, their names.
      task: which inputs and which loss; a key of `TASKS`.
    """

    name: str
    model: str
    sizes: Any
    task: str

    def __str__(self) -> str:
        return self.name


_TABLE = (
    ("albert", "FlaxAlbertForMaskedLM", {**BERT, "embedding_size": 16}, "tokens"),
    ("bart", "FlaxBartForConditionalGeneration", BART, "translate"),
    ("beit", "FlaxBeitForImageClassification", VIT, "images"),
    ("bert", "FlaxBertForMaskedLM", BERT, "tokens"),
    (
        "big_bird",
        "FlaxBigBirdForMaskedLM",
        {**BERT, "block_size": 2, "num_random_blocks": 1},
        "tokens",
    ),
    ("blenderbot", "FlaxBlenderbotForConditionalGeneration", BART, "translate"),
    (
        "blenderbot-small",
        "FlaxBlenderbotSmallForConditionalGeneration",
        BART,
        "translate",
    ),
    (
        "bloom",
        "FlaxBloomForCausalLM",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 1, "n_head": 2},
        "tokens",
    ),
    ("clip", "FlaxCLIPModel", CLIP, "pairs"),
    ("dinov2", "FlaxDinov2ForImageClassification", VIT, "images"),
    (
        "distilbert",
        "FlaxDistilBertForMaskedLM",
        {
            "vocab_size": VOCABULARY,
            "dim": 32,
            "n_layers": 1,
            "n_heads": 2,
            "hidden_dim": 64,
        },
        "tokens",
    ),
    ("electra", "FlaxElectraForMaskedLM", {**BERT, "embedding_size": 16}, "tokens"),
    ("encoder-decoder", "FlaxEncoderDecoderModel", ("bert", "gpt2"), "translate"),
    ("gemma", "FlaxGemmaForCausalLM", LLAMA, "tokens"),
    ("gpt-sw3", "FlaxGPT2LMHeadModel", GPT2, "tokens"),
    ("gpt2", "FlaxGPT2LMHeadModel", GPT2, "tokens"),
    (
        "gpt_neo",
        "FlaxGPTNeoForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 2,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
            "max_position_embeddings": 64,
        },
        "tokens",
    ),
    ("gptj", "FlaxGPTJForCausalLM", {**GPT2, "rotary_dim": 8}, "tokens"),
    ("llama", "FlaxLlamaForCausalLM", LLAMA, "tokens"),
    (
        "longt5",
        "FlaxLongT5ForConditionalGeneration",
        {**T5, "local_radius": 3, "global_block_size": 4},
        "translate",
    ),
    ("marian", "FlaxMarianMTModel", {**BART, "pad_token_id": 0}, "translate"),
    ("mbart", "FlaxMBartForConditionalGeneration", BART, "translate"),
    ("mistral", "FlaxMistralForCausalLM", LLAMA, "tokens"),
    ("mt5", "FlaxMT5ForConditionalGeneration", T5, "translate"),
    (
        "opt",
        "FlaxOPTForCausalLM",
        {**BERT, "ffn_dim": 64, "word_embed_proj_dim": 32},
        "tokens",
    ),
    ("pegasus", "FlaxPegasusForConditionalGeneration", BART, "translate"),
    (
        "regnet",
        "FlaxRegNetForImageClassification",
        {**STAGES, "groups_width": 8},
        "images",
    ),
    (
        "resnet",
        "FlaxResNetForImageClassification",
        {**STAGES, "layer_type": "basic"},
        "images",
    ),
    ("roberta", "FlaxRobertaForMaskedLM", BERT, "tokens"),
    ("roberta-prelayernorm", "FlaxRobertaPreLayerNormForMaskedLM", BERT, "tokens"),
    ("roformer", "FlaxRoFormerForMaskedLM", {**BERT, "embedding_size": 32}, "tokens"),
    (
        "speech-encoder-decoder",
        "FlaxSpeechEncoderDecoderModel",
        ("wav2vec2", "gpt2"),
        "transcribe",
    ),
    ("t5", "FlaxT5ForConditionalGeneration", T5, "translate"),
    (
        "vision-encoder-decoder",
        "FlaxVisionEncoderDecoderModel",
        ("vit", "gpt2"),
        "caption",
    ),
    (
        "vision-text-dual-encoder",
        "FlaxVisionTextDualEncoderModel",
        ("vit", "bert"),
        "pairs",
    ),
    ("vit", "FlaxViTForImageClassification", VIT, "images"),
    ("wav2vec2", "FlaxWav2Vec2ForCTC", WAV2VEC2, "speech"),
    (
        "whisper",
        "FlaxWhisperForConditionalGeneration",
        {
            **BART,
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "max_target_positions": 32,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        "listen",
    ),
    (
        "xglm",
        "FlaxXGLMForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "ffn_dim": 64,
            "num_layers": 1,
            "attention_heads": 2,
            "max_position_embeddings": 64,
        },
        "tokens",
    ),
    ("xlm-roberta", "FlaxXLMRobertaForMaskedLM", BERT, "tokens"),
)
ARCHITECTURES = tuple(Architecture(*row) for row in _TABLE)
BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}


def config_of(architecture: Architecture) -> Any:
    """The tiny configuration of an architecture."""
    make = transformers.CONFIG_MAPPING[architecture.name]
    if not isinstance(architecture.sizes, tuple):
        return make(**architecture.sizes)
    first, second = (config_of(BY_NAME[name]) for name in architecture.sizes)
    if architecture.task == "pairs":
        return make.from_vision_text_configs(first, second, projection_dim=16)
    config = make.from_encoder_decoder_configs(first, second)
    config.decoder_start_token_id = config.pad_token_id = 0
    return config


class Built(NamedTuple):
    """A model of transformers, and the shapes of its weights."""

    model: Any
    shapes: Any


@functools.cache
def build(name: str) -> Built:
    """Builds the model of an architecture without computing a weight."""
    architecture = BY_NAME[name]
    models = []

    def initialise() -> Any:
        model_class = getattr(transformers, architecture.model)
        models.append(model_class(config_of(architecture)))
        return models[0].params

    # The models made of two refuse `_do_init=False`.
    shapes = jax.eval_shape(initialise)
    return Built(models[0], shapes)


def _cross_entropy(logits: Any, labels: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _of_logits(output: Any, labels: Any) -> Any:
    return _cross_entropy(output.logits, labels)


def _contrastive(output: Any, labels: Any) -> Any:
    rows, columns = output.logits_per_image, output.logits_per_text
    return (_cross_entropy(rows, labels) + _cross_entropy(columns, labels)) / 2


def _ctc(output: Any, labels: Any) -> Any:
    padding = jnp.zeros(output.logits.shape[:2], jnp.float32)
    nothing = jnp.zeros(labels.shape, jnp.float32)
    losses = optax.ctc_loss(output.logits, padding, labels, nothing)
    return losses.mean() / output.logits.shape[1]


class Task(NamedTuple):
    """What a model is called with, and its loss.

    Attributes:
      inputs: shape of each input; of integers below `VOCABULARY` if its name says ids.
      labels: their shape, and below which number they are.
      loss: function of the model's output and the labels.
    """

    inputs: dict[str, tuple[int, ...]]
    labels: tuple[tuple[int, ...], int]
    loss: Callable[[Any, Any], Any]


_TEXT, _SOUND, _PICTURES = (BATCH, LENGTH), (BATCH, 400), (BATCH, 3, 32, 32)
_WORDS = (_TEXT, VOCABULARY)
_ANSWER = {"decoder_input_ids": _TEXT}
_MASK = {"attention_mask": _TEXT}
TASKS = {
    "tokens": Task({"input_ids": _TEXT, **_MASK}, _WORDS, _of_logits),
    "translate": Task({"input_ids": _TEXT, **_MASK, **_ANSWER}, _WORDS, _of_logits),
    "images": Task({"pixel_values": _PICTURES}, ((BATCH,), CLASSES), _of_logits),
    "caption": Task({"pixel_values": _PICTURES, **_ANSWER}, _WORDS, _of_logits),
    "listen": Task({"input_features": (BATCH, 8, 32), **_ANSWER}, _WORDS, _of_logits),
    "transcribe": Task({"inputs": _SOUND, **_ANSWER}, _WORDS, _of_logits),
    "speech": Task({"input_values": _SOUND}, ((BATCH, 4), VOCABULARY), _ctc),
    "pairs": Task(
        {"input_ids": _TEXT, "pixel_values": _PICTURES, **_MASK},
        ((BATCH,), BATCH),
        _contrastive,
    ),
}


def batch_of(task: Task, seed: int = 1) -> tuple[dict[str, Any], Any]:
    """Random inputs of a task, by name, and labels."""
    rng = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> Any:
        if name.endswith("ids"):
            return jnp.asarray(rng.integers(3, VOCABULARY, shape), jnp.int32)
        if name.endswith("mask"):  # a few words of padding at the end
            return jnp.ones(shape, jnp.int32).at[0, -3:].set(0)
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    inputs = {name: draw(name, shape) for name, shape in task.inputs.items()}
    shape, below = task.labels
    return inputs, jnp.asarray(rng.integers(1, below, shape), jnp.int32)
