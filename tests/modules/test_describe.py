"""`describe`: the table agrees with what the layers really do."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jaxmp
from jaxmp.errors import MissingExample, UnusedRule
from jaxmp.policy import PolicyRule, default_rules


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(4, name="dense")(nn.LayerNorm(name="norm")(x))


class Net(nn.Module):
    depth: int = 3
    head_dtype: object = None

    @nn.compact
    def __call__(self, x):
        for i in range(self.depth):
            x = Block(name=f"block_{i}")(x)
        return nn.Dense(2, dtype=self.head_dtype, name="head")(x)


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(4, 4, rngs=rngs)
        self.norm = nnx.LayerNorm(4, rngs=rngs)

    def __call__(self, x):
        return x + self.dense(self.norm(x))


class NnxNet(nnx.Module):
    def __init__(self, rngs, depth=3, head_dtype=None):
        self.block = nnx.List([NnxBlock(rngs) for _ in range(depth)])
        self.head = nnx.Linear(4, 2, dtype=head_dtype, rngs=rngs)

    def __call__(self, x):
        for block in self.block:
            x = block(x)
        return self.head(x)


X = jnp.ones((1, 4))


def linen_rows(policy, head_dtype=None, **kwargs):
    description = jaxmp.describe(Net(head_dtype=head_dtype), policy, X, **kwargs)
    return {row.path: row for row in description.rows}


def nnx_rows(policy, head_dtype=None, **kwargs):
    model = NnxNet(nnx.Rngs(0), head_dtype=head_dtype)
    description = jaxmp.describe(model, policy, **kwargs)
    return {row.path: row for row in description.rows}


both = pytest.mark.parametrize("rows_of", [linen_rows, nnx_rows])


@both
def test_every_layer_has_a_row(rows_of):
    rows = rows_of("mixed_bfloat16")
    blocks = {f"block_{i}{part}" for i in range(3) for part in ("", "/dense", "/norm")}
    assert rows.keys() == {"", "head"} | blocks


@both
def test_a_row_says_what_a_layer_stores_computes_and_returns(rows_of):
    rows = rows_of("bf16-true")
    norm, dense = rows["block_1/norm"], rows["block_1/dense"]
    assert norm[2:6] == ("float32", "float32", "bfloat16", "kind='norm'")
    assert dense[2:6] == ("bfloat16", "bfloat16", "bfloat16", "policy")


@both
def test_a_row_says_which_rule_decided(rows_of):
    rules = (PolicyRule(path="block_1/.*", compute="float32"), *default_rules)
    rows = rows_of("mixed_float16", rules=rules)
    assert rows["block_1/dense"][3:6] == ("float32", "float16", "path='block_1/.*'")
    assert rows["block_0/dense"][3:6] == ("float16", "float16", "policy")


@both
def test_an_authors_dtype_is_said_to_be_one(rows_of):
    rows = rows_of("mixed_bfloat16", head_dtype=jnp.float32)
    assert rows["head"][3:6] == ("float32", "float32", "author's dtype")


@both
def test_a_rule_that_matches_nothing_is_an_error(rows_of):
    with pytest.raises(UnusedRule, match=r"'heed'.*Nearest paths: head"):
        rows_of("mixed_bfloat16", rules=(PolicyRule(path="heed", compute="float32"),))


def test_returns_are_what_the_layers_return():
    model = jaxmp.apply_policy(Net(), "mixed_float16", own_code="half")
    variables = model.init(jax.random.key(0), X)
    _, state = model.apply(
        variables, X, capture_intermediates=True, mutable=["intermediates"]
    )
    captured = jax.tree_util.tree_leaves_with_path(state["intermediates"])
    rows = linen_rows("mixed_float16", own_code="half")
    seen = 0
    for path, output in captured:
        names = [key.key for key in path if hasattr(key, "key")]
        layer = "/".join(name for name in names if name != "__call__")
        assert rows[layer].returns == str(output.dtype)
        seen += 1
    assert seen == len(rows)


@pytest.mark.parametrize("depth", [12, 300])
def test_repeated_blocks_share_a_line(depth):
    description = jaxmp.describe(Net(depth), "mixed_bfloat16", X)
    lines = str(description).splitlines()
    assert len(description.rows) == 3 * depth + 2
    assert len(lines) == 2 + 1 + 1 + 3 + 1
    assert any(f"block_*/norm ({depth} times)" in line for line in lines)
    assert max(map(len, lines)) < 100


def test_numbers_are_in_natural_order():
    description = jaxmp.describe(NnxNet(nnx.Rngs(0), depth=12), "float32")
    blocks = [row.path for row in description.rows if row.path.count("/") == 0]
    assert blocks == ["", *(f"block_{i}" for i in range(12)), "head"]


def test_the_policy_that_is_replaced_is_named():
    twice = jaxmp.apply_policy(Net(), "mixed_float16")
    title = jaxmp.describe(twice, "mixed_bfloat16", X).title
    assert title == "policy p=full,c=bf16,o=full, in place of p=full,c=f16,o=full"
    nnx_twice = jaxmp.apply_policy(NnxNet(nnx.Rngs(0)), "mixed_float16")
    assert jaxmp.describe(nnx_twice, "mixed_bfloat16").title == title


def test_of_variables_paths_and_norms_are_known():
    variables = Net().init(jax.random.key(0), X)
    rules = (PolicyRule(path="head", compute="float32"), *default_rules)
    description = jaxmp.describe(variables, "mixed_bfloat16", rules=rules)
    rows = {row.path: row for row in description.rows}
    assert rows["head"].computes == "float32"
    assert rows["block_0/norm"].computes == "float32"
    assert rows["block_0/dense"].computes == "bfloat16"


def test_a_linen_module_needs_an_example():
    with pytest.raises(MissingExample, match=r"describe\(model, policy, jnp.zeros"):
        jaxmp.describe(Net(), "mixed_bfloat16")


def test_the_policy_that_is_in_force_is_not_said_to_replace_itself():
    policied = jaxmp.apply_policy(Net(), "mixed_bfloat16")
    same = jaxmp.describe(policied, "mixed_bfloat16", X)
    assert same.title == "policy p=full,c=bf16,o=full"
    other = jaxmp.describe(policied, "mixed_float16", X)
    assert other.title.endswith("in place of p=full,c=bf16,o=full")
    assert str(same).splitlines()[3].startswith("(model) ")


def test_a_description_is_rows_json_and_a_page(tmp_path):
    description = jaxmp.describe(Net(12), "mixed_bfloat16", X)
    rows = description.to_rows()
    assert [row["path"] for row in rows] == [row.path for row in description.rows]
    written = json.loads(description.to_json())
    assert written == {"title": description.title, "rows": rows}
    description.to_html(tmp_path / "layers.html")
    page = (tmp_path / "layers.html").read_text()
    assert description.title in page
    assert "block_*/norm (12 times)" in page


def test_a_description_is_shown_as_it_is_printed(capsys):
    description = jaxmp.describe(Net(), "mixed_bfloat16", X)
    description.show()
    assert capsys.readouterr().out == f"{description}\n"


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bf16-true", "16-true"])
def test_the_model_returns_what_the_table_says(policy):
    model, x = nn.Sequential([nn.Dense(4), nn.Dense(4)]), jnp.ones((3, 4))
    output, _ = jaxmp.apply_policy(model, policy).init_with_output(jax.random.key(0), x)
    assert jaxmp.describe(model, policy, x).rows[0].returns == str(output.dtype)
