"""`audit` and `report` of a model that is named by its import path."""

import json
import sys

import pytest

from jaxmp.cli import main
from jaxmp.cli._expressions import read_config, read_inputs

MODULE = """
import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


@dataclasses.dataclass(frozen=True)
class Config:
    layers: int = 1
    width: int = 16


class Linen(nn.Module):
    config: Config = Config()

    @nn.compact
    def __call__(self, tokens, train=True):
        x = nn.Embed(32, self.config.width)(tokens)
        for _ in range(self.config.layers):
            x = nn.gelu(nn.Dense(self.config.width)(x))
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return {"logits": nn.Dense(32)(x), "tokens": tokens}


Small = functools.partial(Linen, config=Config(width=8))
MADE = Linen()


def make_linen(layers=1):
    return Linen(Config(layers))


class Nnx(nnx.Module):
    def __init__(self, width, *, rngs):
        self.inner = nnx.Linear(16, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.drop(self.norm(self.inner(x)))


def loss(params, x, temperature=1.0):
    return jnp.mean((x @ params["w"]) ** 2) / temperature, {"x": x}


def leaking(w, x):
    return ((x @ w).astype(jnp.bfloat16) * np.float32(0.125)) @ w.T


def counting(w, x):
    return jnp.argmax(x @ w)


class Other:
    def __init__(self, width):
        raise RuntimeError("never made")
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "nets.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAXMP_CACHE_DIR", str(tmp_path / "cache"))
    yield tmp_path
    sys.modules.pop("nets", None)


def audited(capsys, target, *flags):
    assert main(["audit", target, *flags, "--json", "--quiet"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    return [row for row in rows if row["table"] == "matmul"]


# Two flags are enough for every kind of model, and each takes a step forward and back.
MODELS = {
    "linen class": ("nets:Linen", "Config(layers=2)", "i32[2,4]", 3),
    "linen file": ("nets.py:Linen", "config=Config(2)", "tokens=i32[2,4]", 3),
    "linen in evaluation": ("nets:Linen", "", "i32[2,4], train=False", 2),
    "linen partial": ("nets:Small", "", "i32[2,4]", 2),
    "linen made": ("nets:MADE", "", "i32[2,4]", 2),
    "linen factory": ("nets:make_linen", "layers=3", "i32[2,4]", 4),
    "nnx class": ("nets:Nnx", "width=8", "f32[2,16]", 1),
    "nnx of Flax": ("flax.nnx:Linear", "16, 8", "f32[2,16]", 1),
    "function": ("nets:loss", "temperature=2.0", "{'w': f32[16,8]}, f32[2,16]", 1),
    "by name": ("nets:loss", "", "params={'w': f32[16,8]}, x=f32[2,16]", 1),
    "hugging face": (
        "transformers:FlaxBertModel",
        "vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, "
        "intermediate_size=32, max_position_embeddings=16",
        "i32[2,8]",
        10,
    ),
}


@pytest.mark.parametrize("model", MODELS)
def test_a_training_step_is_made_of_every_kind_of_model(model, capsys):
    target, config, inputs, forward = MODELS[model]
    flags = ["--inputs", inputs, *(["--config", config] if config else [])]
    for written, dtype in (([], "bfloat16"), (["--as-written"], "float32")):
        matmuls = audited(capsys, target, *flags, *written)
        dtypes = {d for m in matmuls for d in m["operands"]}
        assert dtypes - {"int32"} == {dtype}  # BERT has a mask of integers.
        there = sum(m["times"] for m in matmuls if not m["is_backward"])
        assert there == forward
        assert sum(m["times"] for m in matmuls) > there


def test_a_report_compiles_a_model_under_each_policy(capsys):
    command = ["report", "nets:Nnx", "--config", "width=8", "--inputs", "f32[2,16]"]
    policies = ["--policy", "float32", "--policy", "mixed_bfloat16"]
    assert main([*command, *policies, "--target", "cpu", "--json", "--quiet"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["policy"] for row in rows] == ["float32", "mixed_bfloat16"]
    assert all(row["arguments"] > 4 * (16 * 8 + 2 * 16) for row in rows)


def test_a_model_is_failed_on_as_its_author_wrote_it(capsys):
    command = ["audit", "nets:leaking", "--inputs", "f32[16,8], bf16[2,16]"]
    failing = [*command, "--fail-on", "upcast"]
    assert main(failing) == 0
    assert main([*failing, "--as-written"]) == 1
    assert "found upcast" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("target", "flags", "words"),
    [
        ("nets:Linen", {}, "nets:Linen is a model: say what it is called with"),
        ("nets:loss", {"config": "x=1"}, "is to be made of --config: say what it"),
        (
            "nets.Linen",
            {"inputs": "i32[2]"},
            "Write MODULE:FUNCTION, such as nets:Linen",
        ),
        ("nets:Linnen", {"inputs": "i32[2]"}, "Did you mean Linen"),
        ("nets:Linen", {"inputs": "2, 4"}, "holds no array. Write a dtype and a"),
        (
            "nets:Linen",
            {"inputs": "i32"},
            "has int32 without a shape. Write int32",
        ),
        ("nets:Linen", {"inputs": "i32[2,4"}, "cannot be read"),
        ("nets:Linen", {"inputs": "i32[2,4])("}, "cannot be read"),
        ("nets:Linen", {"inputs": "j32[2,4]"}, "no 'j32'. Did you mean"),
        (
            "nets:Linen",
            {"inputs": "i32[2,'b']"},
            "sizes of an array are",
        ),
        (
            "nets:Linen",
            {"inputs": "i32[2], 3, 4"},
            "Linen cannot be called",
        ),
        (
            "nets:Linen",
            {"config": "Config(layer=2)"},
            "unexpected keyword arg",
        ),
        ("nets:Linen", {"config": "Confg()"}, "no 'Confg'. Did you mean 'Config'"),
        (
            "nets:Linen",
            {"config": "layers=2"},
            "Linen takes: config=.... Write",
        ),
        ("nets:Nnx", {}, "nets:Nnx is a model"),
        ("nets:Nnx", {"config": ""}, "Nnx takes: width. Write it in --config"),
        ("nets:Nnx", {"config": "8", "inputs": "f32[2,3]"}, "cannot be called with"),
        ("nets:MADE", {"config": "Config()"}, "made already, so --config has no use"),
        (
            "nets:Other",
            {"inputs": "f32[2]"},
            "Other is a class, but not a",
        ),
        (
            "nets:loss",
            {"inputs": "i32[2], f32[2]"},
            "differentiated by, and",
        ),
        (
            "nets:loss",
            {"inputs": "f32[2], f32[2]"},
            "loss cannot be called",
        ),
        (
            "nets:counting",
            {"inputs": "f32[4,4], f32[2,4]"},
            "counting returns no floating-point array",
        ),
        (
            "flax.nnx:Dropout",
            {"config": "0.5", "inputs": "f32[2]"},
            "no parameters",
        ),
        (
            "transformers:FlaxBertModel",
            {"config": "num_layer=2"},
            "BertConfig has no 'num_layer'. Did you mean num_hidden_layers",
        ),
        (
            "transformers:FlaxBertModel",
            {"config": "2"},
            "settings of the config",
        ),
        ("transformers:FlaxAutoModel", {"inputs": "i32[2]"}, "but not a Flax model"),
    ],
)
def test_a_mistake_is_told_and_ends_with_status_2(target, flags, words, capsys):
    if "config" in flags and target not in ("nets:loss",):
        flags = {"inputs": "i32[2,4]", **flags}
    given = [part for name, x in flags.items() for part in (f"--{name}", x)]
    assert main(["audit", target, *given]) == 2
    told = capsys.readouterr().err
    assert words in told
    assert "Traceback" not in told


def test_as_written_is_for_models(folder, capsys):
    (folder / "steps.py").write_text("def make_step():\n    return abs, 1.0\n")
    assert main(["audit", "steps.py:make_step", "--as-written"]) == 2
    assert "--as-written is for a model" in capsys.readouterr().err


def test_inputs_are_written_as_jax_prints_arrays():
    call = read_inputs("f32[], {'a': bfloat16[2, 3]}, key=key[], n=3, ok=True", {})
    scalar, tree = call.args
    assert (scalar.shape, scalar.dtype) == ((), "float32")
    assert (tree["a"].shape, tree["a"].dtype) == ((2, 3), "bfloat16")
    assert str(call.kwargs["key"].dtype) == "key<fry>"
    assert str(call) == (
        "float32[], {'a': bfloat16[2,3]}, key=key<fry>[], n=3, ok=True"
    )


def test_a_config_uses_the_usual_modules_and_those_of_the_target():
    call = read_config("nn.gelu, dtype=jnp.bfloat16, n=N * 2", {"N": 4})
    assert call.args[0].__name__ == "gelu"
    assert call.kwargs["n"] == 8
